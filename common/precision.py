"""The precision in which a training computes: float32, or bfloat16 where that is faster.

On a CPU bfloat16 makes some models twice as fast and others half as fast, so steps of the training itself are
timed. No timing comes out the same twice, but a training that is done again must give the same bytes. So the
decision is on the disk before anything follows from it.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import structlog
import torch
from pydantic import ValidationError
from torch import nn

from ecavg.common.config import FrozenModel
from ecavg.common.files import replacing

Precision = Literal["float32", "bfloat16"]
# Makes a step of the training, on copies.
MakeStep = Callable[[Precision], Callable[[], object]]

# bfloat16 has to be so many times as fast: for less, its three digits are not worth it.
MIN_SPEED = 1.2
# Only a training of so many steps is measured: at least four of them are lost.
MIN_STEPS = 200
# Only a training of so much processor time is measured: for a small model the decision would be an
# accident.
MIN_SECONDS = 60.0
# Each precision is measured for so much processor time.
SAMPLE_SECONDS = 0.2
MAX_SAMPLES = 10

log = structlog.get_logger()


class _Decision(FrozenModel):
    """The decision that is kept."""

    subject: str
    precision: Precision


def has_bfloat16(device: torch.device) -> bool:
    """Return True if the hardware computes in bfloat16; emulated, it is slow."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def describe(model: nn.Module, input_shape: tuple[int, ...], batch_size: int) -> str:
    """Return in one line all that the speed of a training on the CPU depends on."""
    cpu = _capabilities().get("cpu_name", "CPU")
    size = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{type(model).__name__} of {size} parameters in {len(list(model.modules()))} modules,"
        f" {batch_size} inputs of {'x'.join(map(str, input_shape))} in a batch;"
        f" {cpu}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    )


def decide(path: Path, subject: str, num_steps: int, make_step: MakeStep) -> Precision:
    """Return the faster precision, as decided before, or measured and kept now.

    Processor time is compared, because it depends less than a clock on what else a machine does.

    Args:
        path: the file that keeps the decision. Where it cannot be written, the answer is float32.
        subject: what is decided about; a decision about anything else is replaced.
        num_steps: how many steps the training has.
    """
    kept = _read(path)
    if kept and kept.subject == subject:
        return kept.precision
    if num_steps < MIN_STEPS:
        return "float32"
    speed, seconds = None, _step_seconds(make_step("float32"))
    if seconds * num_steps >= MIN_SECONDS:
        try:
            speed = seconds / _step_seconds(make_step("bfloat16"))
        except RuntimeError as error:
            # The model is the user's, and may do what there is no bfloat16 for.
            log.warning("bfloat16_failed", reason=str(error))
    precision: Precision = "bfloat16" if speed and speed >= MIN_SPEED else "float32"
    try:
        with replacing(path) as partial:
            partial.write_text(_Decision(subject=subject, precision=precision).model_dump_json(), "utf-8")
    except OSError as error:
        log.warning("precision_not_kept", path=str(path), reason=str(error))
        return "float32"
    log.info(
        "precision_decided",
        precision=precision,
        float32_step_seconds=round(seconds, 4),
        bfloat16_speed=speed and round(speed, 2),
        subject=subject,
    )
    return precision


def _capabilities() -> Mapping[str, Any]:
    """Return the capabilities of the CPU; nothing where PyTorch is too old to tell."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities


def _read(path: Path) -> _Decision | None:
    try:
        return _Decision.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        log.warning("precision_ignored", path=str(path), reason=str(error))
        return None


def _step_seconds(step: Callable[[], object]) -> float:
    """Return the least processor time of a step; the first step, which makes kernels, does not count."""
    step()
    taken: list[float] = []
    while sum(taken) < SAMPLE_SECONDS and len(taken) < MAX_SAMPLES:
        started = time.process_time()
        step()
        taken.append(time.process_time() - started)
    return min(taken)
