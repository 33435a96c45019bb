"""Screening: which contributions a round's model is made of, and with which weights.

First the norms of the updates (norms.py); then the audit (audit.py) of those that are left, with the
weights as they will be used.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import nn

from cloud_server.contribution import Contribution
from cloud_server.jobs import AgentAudit
from cloud_server.trainer.audit import Finding, audit
from cloud_server.trainer.norms import clip, scales, update_norms
from common.config import FrozenModel, RunConfig
from common.errors import Reason


class Screening(FrozenModel):
    """What was found and decided."""

    agents: tuple[AgentAudit, ...] = ()  # in the order of the contributions
    note: str = ""  # why those that were flagged are not left out, though they should be


def clipped_path(scratch: Path, agent: int) -> Path:
    """Where the clipped weights of the contribution with this number are."""
    return scratch / f"clipped-{agent}.safetensors"


def screen(
    model: nn.Module,
    weights: Sequence[Path],
    base: Path | None,
    contributions: Sequence[Contribution],
    blobs_dir: Path,
    *,
    run: RunConfig,
    device: torch.device,
    scratch: Path,
) -> Screening:
    """Look at the contributions, at least MIN_AGENTS, and leave the weights of clipped ones in `scratch`.

    Args:
        model: of the run's structure; left with any weights.
        weights: of each contribution, decoded.
        base: what all have started from; None: there is no such thing.

    Raises:
        RunError: weights differ from each other in more than their values.
        OSError: a file cannot be read or written.
    """
    agents = _measured(contributions, update_norms(weights, base), run)
    used = list(weights)
    for number, agent in enumerate(agents):
        if agent.scale < 1:
            used[number] = clipped_path(scratch, number)
            clip(weights[number], base, agent.scale, used[number])
    left = [number for number, agent in enumerate(agents) if not agent.left_out]
    findings = audit(
        model,
        [used[number] for number in left],
        [contributions[number] for number in left],
        blobs_dir,
        run=run,
        device=device,
    )
    for number, finding in zip(left, findings, strict=True):
        agents[number] = _with_finding(agents[number], finding)
    flagged = [number for number in left if agents[number].flags]
    note = ""
    if run.quarantine == "exclude" and 2 * len(flagged) >= len(left):
        note = (
            f"{len(flagged)} of {len(left)} agents are flagged, half of them or more:"
            " nobody knows which half is right, so none is left out"
        )
    elif run.quarantine == "exclude":
        for number in flagged:
            agents[number] = agents[number].model_copy(update={"left_out": Reason.QUARANTINED})
    return Screening(agents=tuple(agents), note=note)


def _measured(
    contributions: Sequence[Contribution], norms: Sequence[float], run: RunConfig
) -> list[AgentAudit]:
    """The norms, and what follows from them."""
    middle, agents = median(norms), []
    for item, norm, scale in zip(contributions, norms, scales(norms, run.max_norm_ratio), strict=True):
        is_rejected = scale < 1 and run.on_large_update == "reject"
        agents.append(
            AgentAudit(
                agent_id=item.agent_id,
                update_norm=min(norm, sys.float_info.max),  # JSON has no infinity
                norm_ratio=min(norm / middle, sys.float_info.max) if 0 < middle < math.inf else None,
                scale=1.0 if is_rejected else scale,
                left_out=Reason.LARGE_UPDATE if is_rejected else None,
            )
        )
    return agents


def _with_finding(agent: AgentAudit, finding: Finding) -> AgentAudit:
    labels, model = finding.labels, finding.model
    return agent.model_copy(
        update={
            "label_share": labels and labels.found,
            "label_share_expected": labels and labels.expected,
            "label_loss": finding.label_loss,
            "model_share": model and model.found,
            "model_share_expected": model and model.expected,
            "flags": finding.flags,
        }
    )
