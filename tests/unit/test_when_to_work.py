"""When a device takes part: at times, with enough new examples; and when it uploads."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from numpy.lib import format as npy
from pydantic import ValidationError

from ecavg.common.background import beside
from ecavg.common.cron import parse_cron
from ecavg.common.pb import ecavg_pb2 as pb
from ecavg.common.run_state import Wait
from ecavg.edge_agent.config import AgentConfig
from ecavg.edge_agent.hours import UploadHours, parse_hours
from ecavg.edge_agent.new_examples import NewExamples, count_examples
from ecavg.edge_agent.readiness import Readiness, Unready, at_times, with_examples
from ecavg.edge_agent.state import AgentState, Progress
from tests.unit.test_agent_client import BLOB, Stream, client_of, streams, unary
from tests.unit.test_readiness import Device

BERLIN = ZoneInfo("Europe/Berlin")
HOUR = 3600.0
EVENING = datetime(2026, 11, 28, 23, tzinfo=BERLIN).timestamp()
NIGHT = EVENING + 3 * HOUR


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[AgentState]:
    with closing(AgentState(tmp_path / "state", "edge-1")) as disk:
        yield disk


# ---------------------------------------------------------------------- times


async def test_device_takes_part_from_the_time_on_until_it_has() -> None:
    clock, since = [EVENING], [EVENING]
    look = at_times(parse_cron("0 2 * * *", BERLIN), lambda: since[0], lambda: clock[0])
    unready = Unready(Wait.TIME, "pretrain_at is at 02:00 CET (in 3 h); taking part then")
    assert await look() == unready
    for now in (NIGHT, NIGHT + 9 * HOUR):
        clock[0] = now
        assert await look() is None
    # It has contributed.
    since[0] = NIGHT + HOUR
    assert (await look() or unready).text == "pretrain_at is at 02:00 CET (in 15 h); taking part then"


async def test_device_that_waits_since_a_time_to_come_waits_for_no_later_one() -> None:
    look = at_times(parse_cron("0 2 * * *", BERLIN), lambda: EVENING + 999 * HOUR, lambda: EVENING)
    unready = await look()
    assert unready
    assert "(in 3 h)" in unready.text


async def test_device_is_not_ready_any_more_as_soon_as_it_has_contributed() -> None:
    device, new = Device("false"), [9]

    async def count() -> int:
        return new[0]

    device.readiness = Readiness(
        ("true",), 60.0, device.said.append, device.changes.append, [with_examples(5, count)]
    )
    # The command has not been run yet, and this does not run it.
    await device.readiness.look()
    assert not device.readiness.is_ready
    assert device.changes == []
    new[0] = 0
    await device.readiness.look()
    assert not device.readiness.is_ready
    assert device.changes == [Wait.EXAMPLES]
    assert device.readiness.waits_for is Wait.EXAMPLES
    assert device.said == ["not ready: there are 0 new examples; taking part with 5 of them"]


async def test_answer_of_a_command_that_was_asked_before_the_contribution_does_not_count(
    tmp_path: Path,
) -> None:
    device, new, counts = Device(), [9], 0
    started, go = tmp_path / "started", tmp_path / "go"

    async def count() -> int:
        nonlocal counts
        counts += 1
        return new[0]

    command = ("sh", "-c", f"touch {started}; until test -e {go}; do sleep 0.01; done")
    device.readiness = Readiness(
        command, 0.01, device.said.append, device.changes.append, [with_examples(5, count)]
    )
    async with beside(device.readiness.keep_asking()):
        await device.until(started.exists)
        new[0] = 0
        await device.readiness.look()
        assert device.changes == [Wait.EXAMPLES]
        go.touch()
        await device.until(lambda: counts > 4)
    assert device.changes == [Wait.EXAMPLES]


# ---------------------------------------------------------------------- new examples


def write_pictures(folder: Path) -> None:
    for name in ("train/cat/1.png", "train/cat/below/2.PNG", "train/dog/3.jpg", "train/dog/notes.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not looked at")
    for name in ("test/cat/4.png", "train/dog/.5.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def write_masks(folder: Path) -> None:
    for name in ("images/1.jpg", "images/2.PNG", "images/below/3.jpg", "masks/1.png", "masks/2.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not looked at")


def write_split_masks(folder: Path) -> None:
    write_masks(folder / "train")
    write_masks(folder / "test")


def write_recordings(folder: Path) -> None:
    for name in ("train/owl/1.wav", "train/owl/below/2.WAV", "train/jay/3.wav", "test/jay/4.wav"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not looked at")


def write_npz(path: Path) -> None:
    np.savez(path, inputs=np.zeros((3, 4)), targets=np.zeros(3), inputs_test=np.zeros((9, 4)))


def write_compressed_npz(path: Path) -> None:
    np.savez_compressed(path, inputs=np.zeros((3, 4)), targets=np.zeros(3))


def write_npy(folder: Path) -> None:
    folder.mkdir()
    np.save(folder / "inputs.npy", np.zeros((3, 4)))
    np.save(folder / "targets.npy", np.zeros(3))


def write_npy_2(folder: Path) -> None:
    write_npy(folder)
    with (folder / "inputs.npy").open("wb") as file:
        npy.write_array(file, np.zeros((3, 4)), version=(2, 0))


def write_split_npy(folder: Path) -> None:
    folder.mkdir()
    write_npy(folder / "train")


def write_table(path: Path) -> None:
    path.write_text("a,b\n1,2\n\n3,4\r\n5,6", "utf-8")


def write_parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"a": [1, 2, 3]}), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("pictures", write_pictures),
        ("masks", write_masks),
        ("masks", write_split_masks),
        ("recordings", write_recordings),
        ("arrays.npz", write_npz),
        ("arrays.npz", write_compressed_npz),
        ("arrays", write_npy),
        ("arrays", write_npy_2),
        ("arrays", write_split_npy),
        ("table.csv", write_table),
        ("table.parquet", write_parquet),
    ],
)
def test_three_examples_are_counted_without_reading_them(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    write(tmp_path / name)
    assert count_examples(tmp_path / name) == 3


@pytest.mark.parametrize(
    ("name", "write", "labels"),
    [
        ("pictures", write_pictures, "pictures/labels.csv"),
        ("arrays.npz", write_npz, "arrays.labels.csv"),
        ("arrays", write_npy, "arrays/labels.csv"),
    ],
)
def test_labels_that_are_told_later_are_as_new_as_examples(
    tmp_path: Path, name: str, write: Callable[[Path], None], labels: str
) -> None:
    write(tmp_path / name)
    (tmp_path / labels).write_text("row,target\n0,1\n2,0\n", "utf-8")
    assert count_examples(tmp_path / name) == 5


@pytest.mark.parametrize("name", ["gone", "gone.csv", "empty.npz", "empty.csv", "no_header.npz", "bad.pq"])
def test_source_that_cannot_be_read_now_has_no_examples(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "bad.pq").write_bytes(b"PAR1")
    np.savez(tmp_path / "no_header.npz", others=np.zeros(3))
    assert count_examples(tmp_path / name) == 0


async def test_what_has_come_since_the_last_contribution_is_new(tmp_path: Path, disk: AgentState) -> None:
    source = tmp_path / "table.csv"
    new = NewExamples(source, disk)
    write_table(source)
    assert await new.count_new() == 3
    disk.save(Progress(num_contributed=2))
    assert await new.count_new() == 1
    disk.save(Progress(num_contributed=7))
    assert await new.count_new() == 0
    assert await NewExamples(None, disk).count_new() == 0


async def test_device_with_too_few_new_examples_is_not_ready() -> None:
    new = [4]

    async def count() -> int:
        return new[0]

    look = with_examples(5, count)
    assert await look() == Unready(Wait.EXAMPLES, "there are 4 new examples; taking part with 5 of them")
    new[0] = 5
    assert await look() is None


class Watches:
    """Keeps the requests of the Watches, all of which break but the last."""

    def __init__(self) -> None:
        self.requests: list[pb.WatchRequest] = []

    def __call__(self, request: pb.WatchRequest, metadata: Any = None) -> Stream:
        self.requests.append(request)
        return Stream(pb.WatchEvent(round=1, phase=pb.PHASE_PUBLISHED, run_over=True))


async def test_server_is_told_for_what_the_agent_waits_and_how_much_is_new() -> None:
    watches = Watches()
    client = client_of(Watch=watches)
    client.say_ready(False, Wait.TIME)
    client.say_new_examples(7)
    _ = [state async for state in client.watch()]
    assert watches.requests == [pb.WatchRequest(not_ready=True, waits_for=pb.WAIT_TIME, num_new_examples=7)]


# ---------------------------------------------------------------------- uploads


def hours_at(said: list[str], minutes: list[int]) -> UploadHours:
    """Return the hours of the night; each time that an upload has slept, the next of the minutes has come."""

    async def sleep(seconds: float) -> None:
        assert seconds <= 60
        minutes.pop(0)

    return UploadHours([parse_hours("22:00-06:00")], said.append, lambda: minutes[0], sleep)


async def test_upload_waits_for_its_hours_and_that_is_said_once() -> None:
    said: list[str] = []
    changes: list[bool] = []
    minutes = [12 * 60, 12 * 60, 22 * 60]
    hours = hours_at(said, minutes)
    await hours.wait(changes.append)
    assert minutes == [22 * 60]
    assert said == [
        "waiting to upload: it is outside of upload_hours",
        "uploading: it is within upload_hours",
    ]
    assert changes == [True, False]
    await hours.wait(changes.append)
    assert (len(said), len(changes)) == (2, 2)


async def test_upload_that_is_given_up_waits_no_more_and_says_nothing() -> None:
    said: list[str] = []
    changes: list[bool] = []
    # There is no time after the first: the sleep raises IndexError.
    with pytest.raises(IndexError):
        await hours_at(said, [12 * 60]).wait(changes.append)
    assert changes == [True, False]
    assert said == ["waiting to upload: it is outside of upload_hours"]


@pytest.mark.parametrize("is_there", [True, False])
async def test_only_what_the_server_does_not_have_waits_and_the_server_hears_of_it(
    tmp_path: Path, is_there: bool
) -> None:
    watches, reply = Watches(), pb.QueryUploadReply(complete=is_there)
    client = client_of(QueryUpload=unary(reply), Upload=streams(), Watch=watches)

    async def look_and_give_up(_: float) -> None:
        _ = [state async for state in client.watch()]
        raise TimeoutError

    night = [parse_hours("22:00-06:00")]
    client._upload_hours = UploadHours(night, lambda _: None, lambda: 12 * 60, look_and_give_up)
    path = tmp_path / "blob"
    path.write_bytes(b"")
    with nullcontext() if is_there else pytest.raises(TimeoutError):
        await client.upload(path, BLOB, "data", lambda *_: None)
    heard = [] if is_there else [pb.WatchRequest(waits_for=pb.WAIT_UPLOAD_HOURS)]
    assert watches.requests == heard


# ---------------------------------------------------------------------- what the user writes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pretrain_at": "0 25 * * *"}, "pretrain_at.*is no line of cron"),
        ({"upload_hours": ("22-6",)}, "upload_hours.*are no hours"),
        ({"min_new_examples": 5}, "min_new_examples.*can be counted"),
        ({"min_new_examples": 5, "data": "digits"}, "min_new_examples.*can be counted"),
        ({"min_new_examples": 5, "data": "my.own:factory"}, "min_new_examples.*can be counted"),
    ],
)
def test_keys_that_make_no_sense_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        AgentConfig(server="127.0.0.1:1", **keys)


def test_line_of_cron_is_in_the_time_zone_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    config = AgentConfig(server="127.0.0.1:1", pretrain_at="0 2 * * *")
    assert config.pretrain_times
    assert config.pretrain_times.next_after(EVENING) == NIGHT
    assert config.pretrain_times.next_after(time.time()) > time.time()
