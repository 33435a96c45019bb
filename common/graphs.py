"""A training step that is recorded once and replayed for each batch, as a CUDA graph.

A small network on a fast GPU waits for Python, which launches hundreds of kernels for each step. A replay
launches all of them at once. It does the same operations on the same memory again and knows nothing of
Python: so the weights, the optimizer's state and the inputs stay where they are, and a number that Python
computes is a tensor.

Whether a replay does what the step does is not assumed. One batch is taken both ways, from the same state,
and unless every bit is equal, the training goes on without replays. No training fails because of a replay.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import structlog
import torch
from torch import Tensor, nn

# Recording costs some 0.2 s and six steps, and a replay saves between half a millisecond (mlp) and 20 ms
# (MobileNetV2). So many steps save as much for a large model, and cost a small one little.
MIN_STEPS = 50
# So many steps are taken before the recorded one, because libraries choose kernels in the first.
NUM_WARM_UP = 3

Step = Callable[[Sequence[Tensor]], None]

log = structlog.get_logger()


class Recorder(Protocol):
    """A way to record what a device does."""

    def record(self, step: Callable[[], object]) -> Callable[[], object]:
        """Return what replays the step; the step is taken meanwhile, any number of times."""


class RecordingError(Exception):
    """A step cannot be recorded; the text is the error that its recording met first."""


class CudaRecorder:
    """The recorder of CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record(self, step: Callable[[], object]) -> Callable[[], object]:
        """Return the replay of a CUDA graph of the step.

        Raises:
            RecordingError: the step cannot be recorded, because it waits for the device, for example.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), _spare_generator(self._device):
            before, stream = torch.cuda.current_stream(), _recording_stream(self._device)
            stream.wait_stream(before)
            # This also leaves the stream where a failed recording does not.
            with torch.cuda.stream(stream):
                for _ in range(NUM_WARM_UP):
                    step()
                _record(graph, stream, step)
            before.wait_stream(stream)
        return graph.replay


def _record(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, step: Callable[[], object]) -> None:
    """Record the step in the graph.

    Raises:
        RecordingError: the step cannot be recorded.
    """
    first = ""
    try:
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            try:
                step()
            except Exception as error:
                # The end of a failed recording raises an error that says less.
                first = _describe(error)
                raise
    except Exception as error:
        raise RecordingError(first or _describe(error)) from None


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which all recordings of this process are made: libraries keep memory for each."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _spare_generator(device: torch.device) -> Iterator[None]:
    """Let a recording have a random state of its own, and put the one from before back if it fails.

    PyTorch leaves the random state of a failed recording unusable.
    """
    generator = torch.cuda.default_generators[device.index or 0]
    before = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    except BaseException:
        generator.graphsafe_set_state(before)
        raise


def recorder_for(device: torch.device) -> Recorder | None:
    """Return the recorder of a device; None: nothing can be recorded there."""
    return CudaRecorder(device) if device.type == "cuda" else None


class ReplayedSteps:
    """The steps of a training with batches of one shape: replays, where they are found to do the same.

    The first step is an ordinary one, because it makes the optimizer's state. The second step is also
    recorded and replayed, from the same state, and compared.

    Args:
        step: takes a step with the inputs that it is given. It changes the tensors of the model and those
            that `more_tensors` returns, in place, and the random state of the device; and nothing else.
        model: the model that is trained; it is not copied.
        more_tensors: returns the other tensors that a step changes.
    """

    def __init__(
        self,
        step: Step,
        model: nn.Module,
        more_tensors: Callable[[], Iterable[Tensor]],
        recorder: Recorder,
        device: torch.device,
    ) -> None:
        self._step, self._model, self._more_tensors = step, model, more_tensors
        self._recorder, self._device = recorder, device
        self._num_taken = 0
        self._is_fit = False
        # What takes a step in place of `_step`; None: nothing does, or not yet.
        self._replay: Step | None = None

    def take(self, inputs: Sequence[Tensor]) -> None:
        """Take a step with these inputs."""
        self._num_taken += 1
        if self._replay:
            self._replay(inputs)
        elif self._num_taken == 1:
            self._take_first(inputs)
        elif self._num_taken == 2 and self._is_fit:
            self._take_second(inputs)
        else:
            self._step(inputs)

    def _take_first(self, inputs: Sequence[Tensor]) -> None:
        before = _python_state(self._model, self._device)
        self._step(inputs)
        changed = _changed(before, _python_state(self._model, self._device))
        self._is_fit = not changed
        if changed:
            _say_not_used(f"a step changes what a replay would not change: {changed}")

    def _take_second(self, inputs: Sequence[Tensor]) -> None:
        try:
            state = _State([*_tensors_of(self._model), *self._more_tensors()], self._device)
        except Exception as error:
            # Nothing has happened yet.
            _say_not_used(_describe(error))
            state = None
        if state is None or not self._could_compare(inputs, state):
            self._step(inputs)

    def _could_compare(self, inputs: Sequence[Tensor], state: "_State") -> bool:
        """Record the step and compare, which takes it, and return True; or leave the state as it was."""
        try:
            self._compare(inputs, state)
        except Exception as error:
            # A model of the user's raises whatever it likes while it is recorded.
            _say_not_used(_describe(error))
        else:
            return True
        # By now the memory of what was recorded is free.
        state.restore()
        return False

    def _compare(self, inputs: Sequence[Tensor], state: "_State") -> None:
        """Take the step as a replay and as usual, and replay from now on if both do the same."""
        started = time.perf_counter()
        # The step is recorded with other inputs, so that one which was read too early shows.
        fixed = [each.flip(0) for each in inputs]
        replay = partial(_refill_and_replay, fixed, self._recorder.record(partial(self._step, fixed)))
        state.restore()
        replay(inputs)
        replayed = state.now()
        # The usual step comes last, so that its result counts. At this moment the memory of both is in use,
        # as when the last, smaller batch of an epoch is taken beside the replays.
        state.restore()
        self._step(inputs)
        if not state.is_now(replayed):
            _say_not_used("a replay gives other bits")
            return
        log.info("graph_recorded", seconds=round(time.perf_counter() - started, 2))
        self._replay = replay


def _refill_and_replay(
    fixed: Sequence[Tensor], replay: Callable[[], object], inputs: Sequence[Tensor]
) -> None:
    for buffer, each in zip(fixed, inputs, strict=True):
        buffer.copy_(each)
    replay()


def _say_not_used(reason: str) -> None:
    log.info("graph_not_used", reason=reason)


class _Moment(NamedTuple):
    """Copies of all that a step changes."""

    values: list[Tensor]
    random_state: Tensor


class _State:
    """The state of a training, to which it can be set back in place.

    Raises:
        Exception: the tensors cannot be copied or set; they are as they were.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._tensors, self._device = tensors, device
        self._kept = self.now()
        # What cannot be written, such as an expanded tensor, is found here, while nothing has changed.
        self.restore()

    def now(self) -> _Moment:
        """Return the state as it is now."""
        is_cuda = self._device.type == "cuda"
        random_state = torch.cuda.get_rng_state(self._device) if is_cuda else torch.get_rng_state()
        return _Moment([tensor.detach().clone() for tensor in self._tensors], random_state)

    def restore(self) -> None:
        """Set the state back."""
        with torch.no_grad():
            for tensor, value in zip(self._tensors, self._kept.values, strict=True):
                tensor.copy_(value)
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(self._kept.random_state, self._device)
        else:
            torch.set_rng_state(self._kept.random_state)

    def is_now(self, moment: _Moment) -> bool:
        """Return True if the state has the same bits as at that moment; NaN is equal to itself."""
        now = self.now()
        pairs = zip(now.values, moment.values, strict=True)
        is_same = all(torch.equal(_bits(one), _bits(other)) for one, other in pairs)
        return is_same and torch.equal(now.random_state, moment.random_state)


def _bits(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor as integers, in the same layout."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()])


def _tensors_of(model: nn.Module) -> list[Tensor]:
    """Return parameters, buffers, and tensors that are plain attributes of a module, each once."""
    found = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        found += [value for value in vars(module).values() if isinstance(value, Tensor)]
    return list({id(tensor): tensor for tensor in found}.values())


def _python_state(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Return what a step may change and no replay does: random states of the CPU, and modules' attributes."""
    numpy_state: Any = np.random.get_state()
    state: dict[str, Any] = {
        "the random state of Python": random.getstate(),
        "the random state of NumPy": (numpy_state[1].tobytes(), numpy_state[2]),
    }
    if device.type != "cpu":
        state["the random state of PyTorch on the CPU"] = torch.get_rng_state().numpy().tobytes()
    for path, module in model.named_modules():
        owned = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, value in [*vars(module).items(), *owned]:
            if value is None or isinstance(value, (bool, int, float, str, Tensor)):
                state[f"{path}.{name}".removeprefix(".")] = value
    return state


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return the name of something that is another value, or another tensor; empty: there is nothing."""
    for name, value in after.items():
        is_same = value is before.get(name) if isinstance(value, Tensor) else value == before.get(name)
        if name not in before or not is_same:
            return name
    return ""


def _describe(error: Exception) -> str:
    """Return kind and first line of an error."""
    if isinstance(error, RecordingError):
        return str(error)
    return f"{type(error).__name__}: {error}".partition("\n")[0]
