"""The audit, on digits: agents that have really been trained, some of them on what is wrong."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.trainer.audit import Finding, audit
from ecavg.cloud_server.trainer.members import Member
from ecavg.cloud_server.trainer.screening import Screening, screen
from ecavg.common.config import RunConfig, TrainingConfig
from ecavg.common.errors import Reason
from ecavg.common.models import build_model
from ecavg.common.seeds import derive_seed
from ecavg.common.shards import Shard, cloud_holdout, write_shard
from ecavg.common.training import Examples, train
from ecavg.common.transfer import blob_of
from ecavg.common.weights import read_state_dict, write_state_dict
from ecavg.edge_agent.partition import partition_indices
from tests.recipes import recipe_of

CPU = torch.device("cpu")
RUN = RunConfig(hidden_units=32, pretrain=TrainingConfig(epochs=5, batch_size=32))


class Agent(NamedTuple):
    contribution: Contribution
    weights: Path


def members(agents: Sequence[Agent]) -> list[Member]:
    return [Member(agent.contribution, agent.weights, agent.weights, 1.0) for agent in agents]


class Workshop:
    """Makes agents, and judges them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model = build_model(RUN, seed=0)
        self.start = self._written(build_model(RUN, seed=1))
        self.blobs_dir = folder / "blobs"

    def agent(self, number: int, shard: Shard, *, factor: float = 1.0) -> Agent:
        """One that trains on its shard, but for the cloud's part; its update is multiplied."""
        agent_id = f"edge-{number:02}"
        seed = derive_seed(RUN.seed, "cloud_holdout", agent_id)
        rest, _ = cloud_holdout(shard.targets, RUN.fine_tune.holdout_fraction, seed)
        model = build_model(RUN, seed=1)
        images, labels = torch.from_numpy(shard.inputs[rest]), torch.from_numpy(shard.targets[rest])
        train(model, Examples(images, labels), recipe_of(RUN, seed=number), device=CPU)
        start = read_state_dict(self.start)
        state_dict = {
            name: start[name] + factor * (tensor - start[name]) for name, tensor in model.state_dict().items()
        }
        write_state_dict(state_dict, self._folder / "new")
        write_shard(self._folder / "shard", shard)
        contribution = Contribution(
            agent_id=agent_id,
            weights_digest=(weights := self._put("new")).name,
            shard_digests=(self._put("shard").name,),
            num_examples=len(shard.targets),
        )
        return Agent(contribution, weights)

    def findings(self, agents: Sequence[Agent], run: RunConfig = RUN) -> list[Finding]:
        return audit(self._model, members(agents), self.blobs_dir, run=run, device=CPU)

    def flags(self, agents: Sequence[Agent]) -> list[tuple[str, ...]]:
        return [finding.flags for finding in self.findings(agents)]

    def screened(self, agents: Sequence[Agent], scratch: Path, **run: object) -> Screening:
        return screen(
            self._model,
            members(agents),
            self.start,
            self.blobs_dir,
            run=RUN.model_copy(update=run),
            device=CPU,
            scratch=scratch,
        )

    def _put(self, name: str) -> Path:
        digest = blob_of(self._folder / name).digest
        target = self.blobs_dir / digest[:2] / digest
        target.parent.mkdir(parents=True, exist_ok=True)
        return (self._folder / name).rename(target)

    def _written(self, model: torch.nn.Module) -> Path:
        write_state_dict(model.state_dict(), self._folder / "start")
        return self._folder / "start"


@pytest.fixture(scope="module")
def digits() -> Shard:
    bunch = load_digits()
    return Shard((bunch.images * (255 / 16)).astype(np.uint8)[:, None], bunch.target.astype(np.int64))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def part_of(digits: Shard) -> Callable[..., Shard]:
    """One agent's part of the digits, by a scheme of the configuration."""

    def part(number: int, count: int = 5, by: str = "iid", seed: int = 0) -> Shard:
        indices = partition_indices(digits.targets, count, by, seed)[number - 1]
        return Shard(digits.inputs[indices], digits.targets[indices])

    return part


@pytest.fixture(scope="module")
def honest(workshop: Workshop, part_of: Callable[..., Shard]) -> list[Agent]:
    return [workshop.agent(number, part_of(number)) for number in range(1, 6)]


def flipped(shard: Shard) -> Shard:
    return Shard(shard.inputs, 9 - shard.targets)


def test_nothing_is_held_against_honest_agents(workshop: Workshop, honest: list[Agent]) -> None:
    findings = workshop.findings(honest)
    for finding in findings:
        assert finding.flags == ()
        assert finding.labels
        assert finding.model
        assert finding.label_loss
        assert abs(finding.labels.expected - finding.labels.found) < 3 * finding.labels.error
        assert finding.model.found > 0.75
    assert workshop.findings(honest) == findings


def test_who_flips_labels_is_flagged_among_five(
    workshop: Workshop, honest: list[Agent], part_of: Callable[..., Shard]
) -> None:
    bad = workshop.agent(2, flipped(part_of(2)))
    agents = [honest[0], bad, *honest[2:]]
    assert workshop.flags(agents) == [(), ("labels", "model"), (), (), ()]
    found, others = workshop.findings(agents)[1], workshop.findings(agents)[0]
    assert found.labels
    assert found.labels.found < 0.1 < 0.7 < found.labels.expected
    assert found.label_loss
    assert others.label_loss
    assert found.label_loss > 2 * others.label_loss


def test_two_of_five_that_flip_labels_are_flagged(
    workshop: Workshop, honest: list[Agent], part_of: Callable[..., Shard]
) -> None:
    bad = [workshop.agent(number, flipped(part_of(number))) for number in (1, 2)]
    flags = workshop.flags([*bad, *honest[2:]])
    assert all("labels" in each for each in flags[:2])
    assert flags[2:] == [(), (), ()]


def test_model_that_was_turned_round_is_flagged_though_the_labels_are_right(
    workshop: Workshop, honest: list[Agent], part_of: Callable[..., Shard]
) -> None:
    bad = workshop.agent(3, part_of(3), factor=-1.0)
    assert workshop.flags([*honest[:2], bad, *honest[3:]]) == [(), (), ("model",), (), ()]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [5, 10])
def test_honest_specialists_are_not_flagged(
    workshop: Workshop, part_of: Callable[..., Shard], seed: int, count: int
) -> None:
    parts = [part_of(number, count, "dirichlet:0.3", seed) for number in range(1, count + 1)]
    agents = [workshop.agent(number, part) for number, part in enumerate(parts, 1) if len(part.targets) > 1]
    assert workshop.flags(agents) == [()] * len(agents)


def test_agent_whose_classes_nobody_else_has_is_not_flagged(workshop: Workshop, digits: Shard) -> None:
    alone, rest = np.flatnonzero(digits.targets >= 8), np.flatnonzero(digits.targets < 8)
    parts = [alone, *np.array_split(np.random.Generator(np.random.PCG64(0)).permutation(rest), 4)]
    agents = [
        workshop.agent(number, Shard(digits.inputs[part], digits.targets[part]))
        for number, part in enumerate(parts, 1)
    ]
    findings = workshop.findings(agents)
    assert [finding.flags for finding in findings] == [()] * 5
    assert (findings[0].labels, findings[0].model) == (None, None)  # there is nothing to compare


def test_a_few_examples_prove_nothing(workshop: Workshop, honest: list[Agent], digits: Shard) -> None:
    few = workshop.agent(1, flipped(Shard(digits.inputs[:3], digits.targets[:3])))
    assert workshop.flags([few, *honest[1:]]) == [()] * 5


def test_of_two_agents_nothing_is_said(workshop: Workshop, honest: list[Agent]) -> None:
    assert workshop.findings(honest[:2]) == [Finding(None, None, None, ())] * 2


def test_of_too_many_agents_the_report_says_that_they_are_not_audited(
    workshop: Workshop, honest: list[Agent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecavg.cloud_server.trainer.audit.MAX_EXAMPLES_IN_ALL", 5 * 9)
    assert workshop.findings(honest) == [Finding(None, None, None, ())] * 5
    note = workshop.screened(honest, tmp_path, quarantine="exclude").note
    assert note == "labels and models are not audited: 5 agents are too many for 10 classes"
    monkeypatch.setattr("ecavg.cloud_server.trainer.audit.MAX_EXAMPLES_IN_ALL", 5 * 10)
    assert all(finding.labels for finding in workshop.findings(honest))
    assert workshop.screened(honest, tmp_path).note == ""


def test_agents_without_shards_help_to_judge_the_others(
    workshop: Workshop, honest: list[Agent], part_of: Callable[..., Shard]
) -> None:
    silent = [
        agent._replace(contribution=replace(agent.contribution, shard_digests=())) for agent in honest[3:]
    ]
    bad = workshop.agent(1, flipped(part_of(1)))
    findings = workshop.findings([bad, *honest[1:3], *silent])
    assert "labels" in findings[0].flags
    assert findings[3] == findings[4] == Finding(None, None, None, ())
    nobody = [each._replace(contribution=silent[0].contribution) for each in honest]
    assert workshop.findings(nobody) == [Finding(None, None, None, ())] * 5


def test_weights_too_large_to_compute_with_spoil_nobodys_figures(
    workshop: Workshop, honest: list[Agent], part_of: Callable[..., Shard]
) -> None:
    bad = workshop.agent(5, part_of(5), factor=1e38)
    findings = workshop.findings([*honest[:4], bad])
    assert [finding.flags for finding in findings] == [(), (), (), (), ("model",)]
    assert all(finding.labels and finding.labels.found > 0.7 for finding in findings)


# Screening: what follows from norms and audit


def test_large_updates_are_clipped_and_the_others_left_as_they_are(
    workshop: Workshop, honest: list[Agent], part_of: Callable[..., Shard], tmp_path: Path
) -> None:
    bad = workshop.agent(1, part_of(1), factor=1000.0)
    agents = workshop.screened([bad, *honest[1:]], tmp_path).agents
    assert [agent.scale < 1 for agent in agents] == [True, False, False, False, False]
    assert [agent.left_out for agent in agents] == [None] * 5
    assert [path.name for path in tmp_path.iterdir()] == ["clipped-edge-01.safetensors"]
    assert agents[0].norm_ratio == pytest.approx(1000, rel=0.3)


def test_large_updates_are_left_out_where_they_are_to_be_rejected(
    workshop: Workshop, honest: list[Agent], part_of: Callable[..., Shard], tmp_path: Path
) -> None:
    bad = workshop.agent(1, part_of(1), factor=1000.0)
    screening = workshop.screened([bad, *honest[1:]], tmp_path, on_large_update="reject")
    assert [agent.left_out for agent in screening.agents] == [Reason.LARGE_UPDATE, None, None, None, None]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("quarantine", "expected"), [("report", None), ("exclude", Reason.QUARANTINED)])
def test_flagged_agents_are_left_out_only_where_that_was_asked_for(
    workshop: Workshop,
    honest: list[Agent],
    part_of: Callable[..., Shard],
    tmp_path: Path,
    quarantine: str,
    expected: Reason | None,
) -> None:
    bad = workshop.agent(1, flipped(part_of(1)))
    screening = workshop.screened([bad, *honest[1:]], tmp_path, quarantine=quarantine)
    assert screening.agents[0].flags == ("labels", "model")
    assert [agent.left_out for agent in screening.agents] == [expected, None, None, None, None]


def test_half_of_the_agents_are_never_left_out(
    workshop: Workshop, honest: list[Agent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accused = [Finding(None, None, None, ("labels",))] * 2 + [Finding(None, None, None, ())] * 2
    monkeypatch.setattr("ecavg.cloud_server.trainer.screening.audit", lambda *_, **__: accused)
    screening = workshop.screened(honest[:4], tmp_path, quarantine="exclude")
    assert [agent.left_out for agent in screening.agents] == [None] * 4
    assert screening.note.startswith("2 of 4 agents are flagged")
