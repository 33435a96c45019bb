"""Screening: the contributions that a round's model is made of, and the weights that each of them gives.

First the norms of the updates are compared (norms.py); then those that are left are audited (audit.py), with
the weights as they will be used.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import nn

from cloud_server.jobs import AgentAudit
from cloud_server.trainer.audit import Finding, audit
from cloud_server.trainer.members import Member
from cloud_server.trainer.norms import clip, scales, update_norms
from common.config import FrozenModel, RunConfig
from common.errors import Reason


class Screening(FrozenModel):
    """What was found and decided about the members of a round."""

    # One for each member, in the same order.
    agents: tuple[AgentAudit, ...] = ()
    # Why flagged agents are not left out, though they should be.
    note: str = ""

    def kept(self, members: Sequence[Member], scratch: Path) -> list[Member]:
        """Return the members that the model is made of, with the weights that they give."""
        return [
            replace(member, weights_path=clipped_path(scratch, member)) if agent.scale < 1 else member
            for member, agent in zip(members, self.agents, strict=True)
            if not agent.left_out
        ]


def clipped_path(scratch: Path, member: Member) -> Path:
    """Return where a member's clipped weights are."""
    return scratch / f"clipped-{member.agent_id}.safetensors"


def screen(
    model: nn.Module,
    members: Sequence[Member],
    base_path: Path | None,
    blobs_dir: Path,
    *,
    run: RunConfig,
    device: torch.device,
    scratch: Path,
) -> Screening:
    """Look at the members' contributions, and write the clipped weights to `scratch`.

    Args:
        model: a model of the run's structure; it is left with any weights.
        members: MIN_AGENTS of them or more.
        base_path: the weights that all have started from; None: there are no such weights.

    Raises:
        RunError: weights differ from each other in more than their values.
        OSError: a file cannot be read or written.
    """
    norms = update_norms([member.weights_path for member in members], base_path)
    agents = _measured(members, norms, run)
    for member, agent in zip(members, agents, strict=True):
        if agent.scale < 1:
            clip(member.weights_path, base_path, agent.scale, clipped_path(scratch, member))
    left = Screening(agents=tuple(agents)).kept(members, scratch)
    findings = audit(model, left, blobs_dir, run=run, device=device)
    found = dict(zip([member.agent_id for member in left], findings, strict=True))
    agents = [
        _with_finding(agent, found[agent.agent_id]) if agent.agent_id in found else agent for agent in agents
    ]
    return _quarantined(agents, len(left), run)


def _quarantined(agents: Sequence[AgentAudit], num_left: int, run: RunConfig) -> Screening:
    """Leave the flagged agents out where the run wants that, unless they are half of all or more."""
    num_flagged = sum(bool(agent.flags) for agent in agents)
    if run.quarantine != "exclude":
        return Screening(agents=tuple(agents))
    if 2 * num_flagged >= num_left:
        note = (
            f"{num_flagged} of {num_left} agents are flagged, half of them or more:"
            " nobody knows which half is right, so none is left out"
        )
        return Screening(agents=tuple(agents), note=note)
    left_out = {"left_out": Reason.QUARANTINED}
    return Screening(
        agents=tuple(agent.model_copy(update=left_out) if agent.flags else agent for agent in agents)
    )


def _measured(members: Sequence[Member], norms: Sequence[float], run: RunConfig) -> list[AgentAudit]:
    """Return the norms of the members' updates, and what follows from them."""
    middle, agents = median(norms), []
    for member, norm, scale in zip(members, norms, scales(norms, run.max_norm_ratio), strict=True):
        is_rejected = scale < 1 and run.on_large_update == "reject"
        agents.append(
            AgentAudit(
                agent_id=member.agent_id,
                # JSON has no infinity.
                update_norm=min(norm, sys.float_info.max),
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
