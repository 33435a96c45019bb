"""How far agents are: what is kept of what they tell, what the server sees itself, and for whom it waits."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.round import Policy, Round, Sampling
from ecavg.cloud_server.showing.progress import CALLS_PER_SECOND, ProgressBoard, Shown
from ecavg.cloud_server.showing.waiting import Pending, sentence
from ecavg.common.agent_progress import Activity, AgentProgress
from ecavg.common.pace import duration
from ecavg.common.run_state import Phase
from ecavg.common.transfer import Blob
from tests.unit.world import world, write_weights


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(clock: Clock) -> ProgressBoard:
    return ProgressBoard(clock)


def training(done: int, total: int | None = 100) -> AgentProgress:
    return AgentProgress(Activity.PRE_TRAINING, done, total, loss=0.5)


def shown(board: ProgressBoard, agent_id: str = "edge-1") -> Shown:
    found = board.of(agent_id)
    assert found
    return found


def test_what_an_agent_tells_is_shown_with_its_pace(board: ProgressBoard, clock: Clock) -> None:
    for clock.now in (0.0, 1.0, 2.0, 3.0):
        board.tell("edge-1", training(int(10 * clock.now)))
    assert shown(board) == Shown(training(30), rate=10.0, seconds_left=7.0)
    assert board.of("edge-2") is None


def test_more_than_one_word_a_second_is_dropped(board: ProgressBoard, clock: Clock) -> None:
    board.tell("edge-1", training(1))
    clock.now = 0.5
    board.tell("edge-1", training(2))
    board.tell("edge-1", AgentProgress(Activity.ADAPTING, 1, 2))
    assert shown(board).progress == training(1)
    clock.now = 1.0
    board.tell("edge-1", AgentProgress(Activity.ADAPTING, 1, 2))
    assert shown(board).progress.activity is Activity.ADAPTING


def test_end_of_an_activity_is_never_dropped(board: ProgressBoard) -> None:
    board.tell("edge-1", training(100))
    board.tell("edge-1", None)
    assert board.of("edge-1") is None


def test_a_thousand_agents_together_are_asked_for_a_bounded_number_of_calls(
    board: ProgressBoard, clock: Clock
) -> None:
    pauses = [board.tell(f"edge-{number}", training(0)) for number in range(1001)]
    assert pauses[0] == 1.0
    assert pauses[-1] == 1000 / CALLS_PER_SECOND
    # Who comes oftener than it was asked to is not looked at.
    clock.now = 0.5 * pauses[-1]
    board.tell("edge-1000", training(50))
    assert shown(board, "edge-1000").progress.done == 0
    clock.now = pauses[-1]
    board.tell("edge-1000", training(60))
    assert shown(board, "edge-1000").progress.done == 60


def test_transfer_is_seen_by_the_server_itself(board: ProgressBoard, clock: Clock) -> None:
    with board.transfer("edge-1", "weights", 1000, 200) as moved:
        moved(200)
        clock.now = 1.0
        assert shown(board) == (AgentProgress(Activity.UPLOADING, 400, 1000), None, None)
        clock.now = 2.0
        moved(200)
        assert shown(board) == (AgentProgress(Activity.UPLOADING, 600, 1000), 100.0, 4.0)
        assert (board.num_transfers("weights", "data"), board.num_transfers("model")) == (1, 0)
    assert board.of("edge-1") is None
    assert board.num_transfers("weights", "data") == 0


def test_training_hides_the_upload_of_images_beside_it_and_no_other_transfer(board: ProgressBoard) -> None:
    board.tell("edge-1", training(1))
    with board.transfer("edge-1", "data", 10, 0):
        assert shown(board).progress.activity is Activity.PRE_TRAINING
        with board.transfer("edge-1", "weights", 10, 0):
            assert shown(board).progress.activity is Activity.UPLOADING
        with board.transfer("edge-1", "model", 10, 0):
            assert shown(board).progress.activity is Activity.DOWNLOADING
        board.tell("edge-1", None)
        assert shown(board).progress.activity is Activity.UPLOADING


async def test_status_and_metrics_show_transfers_while_they_last(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    write_weights(path, 7)
    content = path.read_bytes()
    async with world(tmp_path / "state", min_agents=2, agent_labels=True) as here:

        async def progress() -> Any:
            (agent,) = (await here.status.read())["agents"]
            return agent["progress"] and (agent["progress"]["phase"], agent["progress"]["done"])

        sample = here.metrics.registry.get_sample_value
        await here.desk.join("edge-1")
        watching = here.standing.watch("edge-1")
        await anext(watching)
        blob = Blob(hashlib.sha256(content).hexdigest(), len(content))
        async with here.desk.receive("edge-1", "weights", blob, 0) as upload:
            await upload.write(content[:50])
            assert await progress() == ("uploading", 50)
            assert "edge-1 uploads" in (await here.status.read())["waiting"]
            labels = {"agent_id": "edge-1", "activity": "uploading"}
            assert sample("ecavg_server_agent_progress_ratio", labels) == 50 / len(content)
            await upload.write(content[50:])
        assert await progress() is None
        with here.desk.sending("edge-1", 1000, 300) as sent:
            sent(100)
            assert await progress() == ("downloading", 400)
            assert sample("ecavg_server_downloads") == 1
        assert await progress() is None
        assert sample("ecavg_server_downloads") == 0
        assert sample("ecavg_server_trainer", {"state": "idle"}) == 1
        await watching.aclose()


# --- the sentence ------------------------------------------------------------------------------------

POLICY = Policy(min_agents=3, max_agents=5, deadline_seconds=1800)
# 14:00 UTC.
OPENED_AT = 1_800_021_600.0


def round_with(num_contributions: int, **changes: Any) -> Round:
    contributions = {
        f"done-{number}": Contribution(f"done-{number}", "0" * 64, (), 1)
        for number in range(num_contributions)
    }
    return replace(Round(1, POLICY, OPENED_AT, "1" * 64, contributions=contributions), **changes)


def here(agent_id: str, seconds_left: float | None = None, **progress: Any) -> Pending:
    doing = AgentProgress(**{"activity": Activity.UPLOADING, "done": 1, "total": 4} | progress)
    return Pending(agent_id, None, True, Shown(doing, None, seconds_left))


def away(agent_id: str, seconds: float) -> Pending:
    return Pending(agent_id, OPENED_AT + 900 - seconds, True, None)


def said(current: Round, *pending: Pending, now: float = OPENED_AT + 900) -> str | None:
    return sentence(current, pending, now)


def test_who_holds_up_the_round_is_named_with_the_reason_and_the_time_it_closes() -> None:
    assert said(round_with(3), here("edge-3", 240.0), away("edge-4", 720)) == (
        "Waiting for 2 of 5: edge-4 has been away for 12 min; edge-3 uploads, 4 min left."
        " The round closes at 14:30 UTC with 3."
    )


def test_three_are_named_who_take_longest_and_the_others_are_counted() -> None:
    crowd = [here(f"edge-{number}", 10.0 * number) for number in range(1, 11)]
    current = round_with(0, policy=replace(POLICY, max_agents=10))
    text = said(current, *crowd)
    assert text
    assert text.startswith(
        "Waiting for 10 of 10: edge-10 uploads, 2 min left; edge-9 uploads, 2 min left;"
        " edge-8 uploads, 1 min left; and 7 more."
    )


def test_round_waits_for_the_next_contributions_not_for_all_who_are_away() -> None:
    text = said(round_with(4), away("edge-9", 9000), here("edge-1", 60.0), here("edge-2", 30.0))
    assert text == "Waiting for 1 of 5: edge-2 uploads, 30 s left. The round closes at 14:30 UTC with 4."


def test_what_an_agent_does_is_said_as_far_as_it_is_known() -> None:
    silent, unready = Pending("a", None, True, None), Pending("b", None, False, None)
    text = said(round_with(0), silent, unready, here("c"), here("d", total=None))
    assert text == (
        "Waiting for 5 of 5: d uploads; c uploads, 25 % done; b is not ready to take part; and 1 more;"
        " 1 has not joined. The round closes at 14:30 UTC if 3 have contributed, else it waits."
    )
    assert "a has not contributed" in (said(round_with(4), silent) or "")


@pytest.mark.parametrize(
    ("changes", "minutes", "ending"),
    [
        ({}, 45, "The round closes as soon as 3 have contributed."),
        (
            {"policy": replace(POLICY, on_too_few="fail")},
            15,
            "The round fails at 14:30 UTC if fewer than 3 have contributed.",
        ),
        (
            {"policy": replace(POLICY, deadline_seconds=3 * 86_400.0)},
            0,
            "The round closes on 2027-01-18 at 14:00 UTC if 3 have contributed, else it waits.",
        ),
        (
            {"policy": replace(POLICY, deadline_seconds=None)},
            15,
            "edge-1 uploads, 25 % done; 4 have not joined.",
        ),
    ],
)
def test_end_of_the_round_is_said_as_its_rule_has_it(
    changes: dict[str, Any], minutes: int, ending: str
) -> None:
    text = said(round_with(0, **changes), here("edge-1"), now=OPENED_AT + 60 * minutes)
    assert text
    assert text.endswith(ending)


def test_before_the_draw_the_round_waits_for_agents_to_connect() -> None:
    current = round_with(0, policy=replace(POLICY, sampling=Sampling(0, 5, 8)))
    text = said(current, here("a"), Pending("b", None, False, None), away("c", 5))
    assert text == "Waiting to draw the agents of the round: 1 of 8 are connected and ready."


def test_round_that_collects_no_more_waits_for_nobody() -> None:
    assert said(round_with(3, phase=Phase.AGGREGATING), here("edge-1")) is None
    assert said(round_with(5), here("edge-1")) is None


def test_durations_are_in_their_largest_unit() -> None:
    seconds = (0.4, 59.4, 59.6, 3570.0, 3600.0, 47 * 3600.0, 5 * 86_400.0)
    assert [duration(each) for each in seconds] == ["0 s", "59 s", "1 min", "1 h", "1 h", "47 h", "5 d"]
