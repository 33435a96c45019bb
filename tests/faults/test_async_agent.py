"""An agent in a run with `mode = "async"`: it finishes what it has begun, wherever it is cut off."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ecavg.common.config import Wire
from ecavg.common.errors import InvalidError, NotFoundError, Reason
from ecavg.common.run_state import Outcome, PublishedModel, RunState, Verdict
from ecavg.common.transfer import Blob
from ecavg.edge_agent.async_member import _begun_with, _state_at
from ecavg.edge_agent.state import AgentState, Begun, Progress
from tests.faults.test_agent_restart import RUN, Cloud, Power, PowerCutError, live, run_state

ASYNC = RUN.model_copy(update={"mode": "async"})


class Taken(NamedTuple):
    """A contribution that a round has taken: the digests of weights and start."""

    weights: str
    start: str


class HurryingCloud(Cloud):
    """It is in round 3 as soon as the agent has fetched what it starts from in round 1.

    Args:
        late_rounds: close in the moment in which the agent contributes to them.
        is_last: True where no round follows the first.
        is_gone: True if it is in round 3 from the beginning, and does not have that start any more.
    """

    def __init__(
        self,
        folder: Path,
        *,
        wire: Wire = "float32",
        late_rounds: tuple[int, ...] = (),
        is_last: bool = False,
        is_gone: bool = False,
    ) -> None:
        super().__init__(folder, ASYNC.model_copy(update={"wire": wire}))
        self.taken: dict[int, Taken] = {}
        # The digest of a start from which no round takes anything.
        self.refused = ""
        self._open = 3 if is_gone else 1
        self._is_gone = is_gone
        self._late_rounds = late_rounds
        self._is_last = is_last

    def state(self) -> RunState:
        number, has_hurried = self._open, self._open > 1
        is_last_taken = bool(self.reports) and self.reports[-1].round == number - 1
        return run_state(
            number,
            self.published if has_hurried else self.initial,
            latest_model=PublishedModel(number - 1, self.published, None) if has_hurried else None,
            counted_round=max(self.taken, default=0),
            last_round_over=has_hurried and self._is_last,
            run_over=is_last_taken and (bool(self.taken) or self._is_last),
        )

    def copy(self, blob: Blob, path: Path) -> None:
        if blob == self.initial:
            self._open = max(self._open, 3)
            if self._is_gone:
                raise NotFoundError("gone")
        super().copy(blob, path)

    def take(self, number: int, contribution: dict[str, Any]) -> Verdict:
        weights, start = contribution["weights"].digest, contribution["initial_weights"]
        if known := self.taken.get(number):
            return Verdict(Outcome.ACCEPTED if known.weights == weights else Outcome.LATE)
        if start == self.refused:
            raise InvalidError("too old", Reason.INITIAL_WEIGHTS)
        if number == self._open in self._late_rounds:
            self._open += 1
        if number != self._open or self._is_last:
            return Verdict(Outcome.LATE)
        self.taken[number] = Taken(weights, start)
        self._open += 1
        return Verdict(Outcome.ACCEPTED)


@pytest.mark.parametrize(("late_rounds", "number"), [((), 3), ((3, 4), 5)])
async def test_agent_contributes_to_the_round_that_is_open_when_it_has_finished(
    tmp_path: Path, late_rounds: tuple[int, ...], number: int
) -> None:
    cloud = HurryingCloud(tmp_path / "cloud", late_rounds=late_rounds)
    progress = await live(cloud, tmp_path / "agent", Power(None))
    assert progress.trained
    assert cloud.taken == {number: Taken(progress.trained.weights.digest, cloud.initial.digest)}
    assert progress.begun is None
    # The newest model is taken next, and the one before it never.
    assert [report.round for report in cloud.reports] == [number]
    assert cloud.reports[0].score_local == progress.trained.score


async def test_agent_that_is_too_old_starts_again_from_the_newest_model(tmp_path: Path) -> None:
    cloud = HurryingCloud(tmp_path / "cloud")
    cloud.refused = cloud.initial.digest
    await live(cloud, tmp_path / "agent", Power(None))
    assert [taken.start for taken in cloud.taken.values()] == [cloud.published.digest]
    assert list(cloud.taken) == [3]


async def test_agent_whose_start_is_gone_starts_again_from_the_newest_model(tmp_path: Path) -> None:
    cloud = HurryingCloud(tmp_path / "cloud", is_gone=True)
    disk = AgentState(tmp_path / "agent", "edge-1")
    begun = Begun(round=1, initial_weights=cloud.initial, has_full_curve=False)
    disk.save(Progress(run_id="run", begun=begun))
    disk.close()
    await live(cloud, tmp_path / "agent", Power(None))
    assert [taken.start for taken in cloud.taken.values()] == [cloud.published.digest]


def test_what_was_begun_goes_on_with_the_rest_that_belongs_to_its_start() -> None:
    older, newer = Blob("1" * 64, 1), Blob("2" * 64, 1)
    kept = _begun_with(run_state(1, older, initial_rest=older)).model_dump_json()
    start = _state_at(Begun.model_validate_json(kept), run_state(3, newer, initial_rest=newer))
    assert (start.round, start.initial_weights, start.initial_rest) == (1, older, older)


async def test_agent_leaves_its_work_for_the_model_of_the_last_round(tmp_path: Path) -> None:
    cloud = HurryingCloud(tmp_path / "cloud", is_last=True)
    progress = await live(cloud, tmp_path / "agent", Power(None))
    assert cloud.taken == {}
    assert [report.round for report in cloud.reports] == [2]
    assert progress.begun is None


@pytest.mark.parametrize(
    ("wire", "late_rounds"),
    [pytest.param("float32", (), marks=pytest.mark.soak), ("int8", (3,))],
    ids=["float32", "int8-and-late"],
)
async def test_contribution_counts_once_wherever_the_agent_was_cut_off(
    tmp_path: Path, wire: Wire, late_rounds: tuple[int, ...]
) -> None:
    def cloud_in(name: str) -> HurryingCloud:
        return HurryingCloud(tmp_path / name, wire=wire, late_rounds=late_rounds)

    undisturbed, power = cloud_in("cloud"), Power(None)
    progress = await live(undisturbed, tmp_path / "agent", power)
    residuals = {path.name for path in (tmp_path / "agent").glob("residual-*")}
    assert power.moments > 20
    for moment in range(power.moments):
        cloud, folder = cloud_in(f"cloud-{moment}"), tmp_path / f"agent-{moment}"
        with pytest.raises((PowerCutError, ExceptionGroup)):
            await live(cloud, folder, Power(moment))
        again = await live(cloud, folder, Power(None))
        assert cloud.taken == undisturbed.taken, moment
        assert (again.trained, again.begun) == (progress.trained, None)
        assert set(map(repr, cloud.reports)) == set(map(repr, undisturbed.reports)), moment
        assert {path.name for path in folder.glob("residual-*")} == residuals
