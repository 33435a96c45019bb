"""Screening: the choice of the contributions from which a round's model is made, and the clipping of weights.

The norms of the updates are compared first (norms.py). The remaining contributions are then audited
(audit.py), with the weights as the model will use them.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import nn

from ecavg.cloud_server.jobs import AgentAudit
from ecavg.cloud_server.trainer.audit import Finding, audit, has_too_many
from ecavg.cloud_server.trainer.members import Member
from ecavg.cloud_server.trainer.norms import clip, scales, update_norms
from ecavg.common.config import FrozenModel, RunConfig
from ecavg.common.errors import Reason
from ecavg.common.tasks import kind_of


class Screening(FrozenModel):
    """The findings and decisions about the members of a round."""

    # The findings and decisions about each member, in the order of the members.
    agents: tuple[AgentAudit, ...] = ()
    # The reason why flagged agents are not left out, although the run leaves flagged agents out; or why
    # labels and models were not audited.
    note: str = ""

    def kept(self, members: Sequence[Member], scratch: Path) -> list[Member]:
        """Return the members from which the model is made; clipped members have their clipped weights."""
        return [
            replace(member, weights_path=clipped_path(scratch, member)) if agent.scale < 1 else member
            for member, agent in zip(members, self.agents, strict=True)
            if not agent.left_out
        ]


def clipped_path(scratch: Path, member: Member) -> Path:
    """Return the path of a member's clipped weights."""
    return scratch / f"clipped-{member.agent_id}.safetensors"


def screen(
    model: nn.Module | None,
    members: Sequence[Member],
    base_path: Path | None,
    blobs_dir: Path,
    *,
    run: RunConfig,
    device: torch.device,
    scratch: Path,
    rest: Path | None = None,
) -> Screening:
    """Screen the members' contributions, and write clipped weights to `scratch`.

    Args:
        model: a model of the run's structure, whose weights are overwritten; None: nothing is audited.
        members: the members of the round, at least MIN_AGENTS of them.
        base_path: the file of the weights from which all members started; None if they differ in that.
        blobs_dir: the directory of the blobs.
        run: the configuration of the run.
        device: the device on which the models are run.
        scratch: an existing folder for clipped weights.
        rest: the file of the cloud's values for what members do not send; None if they send whole models.

    Raises:
        RunError: the members' weights differ in names, shapes or dtypes.
        OSError: a file cannot be read or written.
    """
    norms = update_norms([member.weights_path for member in members], base_path)
    agents = _measured(members, norms, run)
    for member, agent in zip(members, agents, strict=True):
        if agent.scale < 1:
            clip(member.weights_path, base_path, agent.scale, clipped_path(scratch, member))
    left = Screening(agents=tuple(agents)).kept(members, scratch)
    if note := _why_not_audited(len(left) if model else 0, run):
        return Screening(agents=tuple(agents), note=note)
    findings = audit(model, left, blobs_dir, run=run, device=device, rest=rest) if model else []
    found = dict(zip([member.agent_id for member in left if model], findings, strict=True))
    agents = [
        _with_finding(agent, found[agent.agent_id]) if agent.agent_id in found else agent for agent in agents
    ]
    return _quarantined(agents, len(left), run)


def _why_not_audited(num_agents: int, run: RunConfig) -> str:
    """Return why labels and models cannot be audited; "" if they can be."""
    if not kind_of(run.task).is_audited:
        return f"labels and models are not audited, which is for classification; the task is {run.task}"
    if num_agents and has_too_many(num_agents, run):
        return (
            f"labels and models are not audited: {num_agents} agents are too many for"
            f" {run.spec.num_classes} classes"
        )
    return ""


def _quarantined(agents: Sequence[AgentAudit], num_left: int, run: RunConfig) -> Screening:
    """Return the screening in which flagged agents are left out, if the run is configured to do so.

    No agent is left out if half of the agents or more are flagged.
    """
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
    """Return the findings and decisions that follow from the norms of the members' updates."""
    middle, agents = median(norms), []
    for member, norm, scale in zip(members, norms, scales(norms, run.max_norm_ratio), strict=True):
        is_rejected = scale < 1 and run.on_large_update == "reject"
        agents.append(
            AgentAudit(
                agent_id=member.agent_id,
                # The largest float64 stands for infinity, because JSON has no infinity.
                update_norm=min(norm, sys.float_info.max),
                norm_ratio=min(norm / middle, sys.float_info.max) if 0 < middle < math.inf else None,
                scale=1.0 if is_rejected else scale,
                left_out=Reason.LARGE_UPDATE if is_rejected else None,
            )
        )
    return agents


def _with_finding(agent: AgentAudit, finding: Finding) -> AgentAudit:
    """Return the record of the agent with the audit's finding added."""
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
