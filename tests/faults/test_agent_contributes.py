"""What an agent sends in a round and when, and what counts as sent, whatever goes wrong meanwhile."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ecavg.common.errors import InvalidError, NotFoundError, Reason, UsageError
from ecavg.common.run_state import Outcome, Verdict, Wait
from ecavg.common.transfer import Blob
from ecavg.edge_agent.member import MAX_SENDINGS
from ecavg.edge_agent.state import Begun, Progress, Trained
from tests.faults.started import Sluggish, Started, Steered, end_when_contributed, train_blocked, when_saved
from tests.faults.test_agent_restart import Cloud

SENT = Blob("sent", 1)


class Forgetful(Steered):
    """Has lost what was uploaded; more than once."""

    num_uploads = 0
    num_losses = 2

    async def upload(self, path: Path, blob: Blob, kind: str, on_bytes: Any) -> None:
        self.num_uploads += 1

    async def contribute(self, number: int, **contribution: Any) -> Verdict:
        if self.num_uploads <= 2 * self.num_losses:
            raise NotFoundError("not uploaded", Reason.MISSING_BLOB)
        return await super().contribute(number, **contribution)


@pytest.mark.parametrize("num_losses", [2, 99])
async def test_blobs_that_the_server_lost_are_uploaded_again(
    tmp_path: Path, num_losses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Started(tmp_path, Forgetful)
    monkeypatch.setattr(started.client, "num_losses", num_losses)
    end_when_contributed(started)
    started.send()
    await started.run()
    assert started.cloud.counts["contributions"] == (num_losses < MAX_SENDINGS)
    assert started.client.num_uploads == 2 * MAX_SENDINGS  # type: ignore[attr-defined]


async def test_data_travel_while_the_agent_trains(tmp_path: Path) -> None:
    started = Started(tmp_path, Sluggish)
    client: Any = started.client
    training = train_blocked(started)
    end_when_contributed(started)
    client.let_through.set()
    started.send()
    running = asyncio.create_task(started.run())
    await asyncio.to_thread(training.entered.wait, 30)
    await asyncio.wait_for(client.data_came.wait(), 30)
    assert client.uploaded == ["data"]
    training.let_go()
    await running
    assert client.uploaded == ["data", "weights"]
    assert started.cloud.counts["contributions"] == 1


async def test_data_that_take_longer_than_the_training_are_waited_for(tmp_path: Path) -> None:
    started = Started(tmp_path, Sluggish)
    client: Any = started.client
    trained = when_saved(started, lambda progress: progress.trained)
    end_when_contributed(started)
    started.send()
    running = asyncio.create_task(started.run())
    await asyncio.wait_for(trained.wait(), 30)
    assert started.cloud.counts["contributions"] == 0
    client.let_through.set()
    await running
    assert client.uploaded == ["data", "weights"]


class OutsideOfHours(Sluggish):
    """Uploads of data wait for hours that never come."""

    def __init__(self, cloud: Cloud) -> None:
        super().__init__(cloud)
        self.gave_up = asyncio.Event()

    async def upload(self, path: Path, blob: Blob, kind: str, on_bytes: Any) -> None:
        self.upload_waits = True
        try:
            await super().upload(path, blob, kind, on_bytes)
        finally:
            self.upload_waits = False
            self.gave_up.set()


@pytest.mark.parametrize("is_trained_first", [False, True])
async def test_model_is_taken_where_the_round_closes_outside_of_upload_hours(
    tmp_path: Path, is_trained_first: bool
) -> None:
    started = Started(tmp_path, OutsideOfHours)
    client: Any = started.client
    training, trained = train_blocked(started), when_saved(started, lambda progress: progress.trained)
    started.send()
    running = asyncio.create_task(started.run())
    await asyncio.to_thread(training.entered.wait, 30)
    await asyncio.wait_for(client.data_came.wait(), 30)
    if is_trained_first:
        training.let_go()
        await asyncio.wait_for(trained.wait(), 30)
        started.send(phase="aggregating")
    else:
        # What has begun is finished.
        started.send(phase="aggregating")
        training.let_go()
    await asyncio.wait_for(client.gave_up.wait(), 30)
    evaluated = when_saved(started, lambda progress: progress.evaluated_round == 1)
    started.send(latest=1, phase="aggregating")
    await asyncio.wait_for(evaluated.wait(), 30)
    started.send(latest=1, over=True)
    await running
    assert "round 1 has closed: what was trained for it is not uploaded" in started.said
    assert (client.uploaded, started.cloud.counts["contributions"]) == ([], 0)
    progress = started.disk.progress
    assert progress.trained
    assert (progress.trained.round, progress.evaluated_round) == (1, 1)


async def test_refused_data_are_told_after_the_training_and_not_sent_again(tmp_path: Path) -> None:
    started = Started(tmp_path, Sluggish)
    client: Any = started.client
    client.refusal = InvalidError("not a shard of the run's dataset", Reason.INVALID_SHARD)
    client.let_through.set()
    end_when_contributed(started)
    started.send()
    await started.run()
    assert client.uploaded == []
    assert started.cloud.counts["contributions"] == 0
    assert "round 1: contribution rejected: not a shard of the run's dataset" in started.said
    progress = started.disk.progress
    assert (progress.contributed_round, progress.trained is not None) == (1, True)
    assert started.disk.model.exists()


async def test_data_that_cannot_be_read_again_are_used_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> str:
        raise UsageError("no class folders in photos/train")

    monkeypatch.setattr("ecavg.edge_agent.local_data.data_stamp", gone)
    started = Started(tmp_path)
    started.disk.save(Progress(run_id="run", num_taken=7))
    end_when_contributed(started)
    started.send()
    await started.run()
    assert started.cloud.counts["contributions"] == 1
    # What has come since is new until it can be read.
    assert started.disk.progress.num_contributed == 7
    assert started.disk.progress.num_contributed_before == 0
    assert any("those of before are used: no class folders" in text for text in started.said)


@pytest.mark.parametrize(
    ("phase", "outcome", "num_contributed"),
    [
        ("failed", Outcome.ACCEPTED, 2),
        # This device had no part in the round that failed.
        ("failed", None, 7),
        ("fine_tuning", Outcome.ACCEPTED, 7),
    ],
)
async def test_examples_of_a_round_that_failed_are_new_again(
    tmp_path: Path, phase: str, outcome: Outcome | None, num_contributed: int
) -> None:
    started = Started(tmp_path)
    started.disk.save(
        Progress(run_id="run", contributed_round=1, num_contributed=7, num_contributed_before=2)
    )
    started.send(phase=phase, outcome=outcome)
    started.send(phase=phase, outcome=outcome, over=True)
    await started.run()
    assert started.disk.progress.num_contributed == num_contributed


def sent_unheard(latest: int, **others: Any) -> Progress:
    """Return the progress of a device that ended when it had sent a contribution to round 1.

    Args:
        latest: the newest round whose model the device has taken.
    """
    return Progress(
        run_id="run",
        contributed_round=0,
        evaluated_round=latest,
        sent_weights=(SENT.digest,),
        trained=Trained(round=1, weights=SENT, score=0.5, shards=("of before",)),
        **others,
    )


@pytest.mark.parametrize(
    ("phase", "latest", "accepted_weights", "counts"),
    [
        # The round is still open, has closed, has failed, and has been followed by another one.
        ("collecting", 0, "sent", (9, 7)),
        ("fine_tuning", 0, "sent", (9, 7)),
        ("failed", 0, "sent", (7, None)),
        ("aggregating", 1, "", (9, 7)),
        # It has accepted nothing of this device.
        ("fine_tuning", 0, "", (7, 2)),
    ],
)
async def test_contribution_that_was_accepted_unheard_is_noted(
    tmp_path: Path, phase: str, latest: int, accepted_weights: str, counts: tuple[int, int | None]
) -> None:
    """The device ended after the server had accepted its contribution, and before it heard of that."""
    started = Started(tmp_path)
    started.disk.save(sent_unheard(latest, num_taken=9, num_contributed=7, num_contributed_before=2))
    outcome = Outcome.ACCEPTED if accepted_weights else None
    for over in (False, True):
        started.send(
            latest=latest, phase=phase, outcome=outcome, accepted_weights=accepted_weights, over=over
        )
    await started.run()
    progress = started.disk.progress
    assert (progress.num_contributed, progress.num_contributed_before) == counts
    assert started.cloud.counts["contributions"] == 0


async def test_contribution_that_never_arrived_is_made_though_none_has_counted_before(tmp_path: Path) -> None:
    """The device ended after it had noted what it would send, before the server heard of that."""
    started = Started(tmp_path)
    started.disk.save(Progress(run_id="run", sent_weights=("on its way",)))
    assert started.disk.progress.contributed_round == -1
    taken_for_the_warm_up = when_saved(started, lambda progress: progress.contributed_round == 0)
    end_when_contributed(started)
    started.send()
    await started.run()
    assert started.cloud.counts["contributions"] == 1
    assert not taken_for_the_warm_up.is_set()


@pytest.mark.parametrize(("latest", "accepted_weights"), [(0, "sent"), (1, "")])
async def test_what_was_begun_counts_once_though_there_are_new_data_since(
    tmp_path: Path, latest: int, accepted_weights: str
) -> None:
    """Without the state, the device would train again on its new data from where it began."""
    started = Started(tmp_path)
    started.client.run = started.client.run.model_copy(update={"mode": "async"})
    begun = Begun(round=1, initial_weights=SENT, has_full_curve=False, offered_to=1, offered=SENT)
    started.disk.save(sent_unheard(latest, begun=begun))
    for over in (False, True):
        started.send(latest=latest, phase="aggregating", accepted_weights=accepted_weights, over=over)
    await started.run()
    progress = started.disk.progress
    assert (progress.begun, progress.contributed_round, progress.sent_weights) == (None, 1, ())
    assert started.cloud.counts["contributions"] == 0


async def test_data_that_have_changed_are_read_again_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecavg.edge_agent.local_data.data_stamp", lambda *_: "another")
    started = Started(tmp_path)
    loaded, trained = [], []

    def count(load: Callable[[], Any]) -> Any:
        models = load()
        loaded.append(models)
        pretrain = models.pretrain

        def then_pretrain(*args: Any, **kwargs: Any) -> Any:
            trained.append(models)
            return pretrain(*args, **kwargs)

        models.pretrain = then_pretrain
        return models

    started.load = count
    end_when_contributed(started)
    started.send()
    await started.run()
    assert len(loaded) == 2
    assert trained == [loaded[1]]


async def test_agent_that_has_contributed_at_its_time_waits_for_the_next(tmp_path: Path) -> None:
    # On New Year's Day; two years have gone by since the last contribution.
    started = Started(tmp_path, pretrain_at="0 0 1 1 *")
    long_ago = time.time() - 2 * 365 * 86_400
    started.disk.save(Progress(run_id="run", waits_since=long_ago, num_taken=7))
    say_ready = started.client.say_ready

    def then_end(is_ready: bool, waits_for: Wait | None = None) -> None:
        say_ready(is_ready, waits_for)
        if waits_for:
            started.send(over=True)

    started.client.say_ready = then_end  # type: ignore[method-assign]
    started.send()
    await started.run()
    assert started.cloud.counts["contributions"] == 1
    assert started.client.waits == [None, None, Wait.TIME]
    assert any("not ready: pretrain_at is on " in text for text in started.said)
    assert started.disk.progress.waits_since == pytest.approx(time.time(), abs=60)
