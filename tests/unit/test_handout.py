"""Jobs that go through a bucket: the server's end, and the relay of a training machine."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.disk.bucket import Bucket
from ecavg.cloud_server.jobs import (
    EncodedWeightsFile,
    Job,
    JobDirectory,
    JobError,
    Progress,
    Result,
    WeightsFile,
)
from ecavg.cloud_server.state_dir import StateDir, blob_path
from ecavg.cloud_server.trainer import __main__ as trainer
from ecavg.cloud_server.trainer import work
from ecavg.cloud_server.trainer.group import Group
from ecavg.cloud_server.training import relay as relay_module
from ecavg.cloud_server.training.handout import ExternalTrainers, HandOut
from ecavg.cloud_server.training.relay import Relay
from ecavg.common.config import RunConfig
from ecavg.common.errors import RunError, StorageError, UsageError
from tests.buckets import Service, s3_service
from tests.unit.states import digest_of

SENT, MODEL, ENCODED, REST = b"sent weights", b"a model", b"an encoded model", b"what does not travel"
JOB = Job(
    kind="round", name="round-0001", round=1, run=RunConfig(), device="cpu", initial_weights=None,
    contributions=(Contribution("a", digest_of(SENT), (), 1),),
)  # fmt: skip
RESULT = Result(
    weights=WeightsFile(sha256=digest_of(MODEL), bytes=len(MODEL)),
    encoded=EncodedWeightsFile(sha256=digest_of(ENCODED), bytes=len(ENCODED), base=None),
)
LINE = Progress(phase="aggregating", done=1, total=2)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with s3_service() as service:
        yield service


class Both:
    """A server and a training machine with nothing in common but a bucket."""

    def __init__(self, folder: Path, url: str) -> None:
        self.bucket = Bucket(url)
        self.server, self.machine = StateDir(folder / "server"), StateDir(folder / "machine")
        self.server.jobs.mkdir(parents=True)
        self.put(SENT, folder / "sent")
        self.hand_out, self.relay = HandOut(self.server, self.bucket), Relay(self.machine, self.bucket)
        self.here = JobDirectory(self.server.job(JOB.name))
        self.there = JobDirectory(self.machine.job(JOB.name))

    def put(self, content: bytes, path: Path) -> str:
        path.write_bytes(content)
        self.bucket.put(path, digest_of(content))
        return digest_of(content)

    def steps(self) -> None:
        for _ in range(2):
            self.hand_out.step()
            self.relay.step()

    def do_job(self, result: Result = RESULT) -> None:
        self.there.append_progress(LINE)
        if result.weights:
            self.there.weights_path.write_bytes(MODEL)
            self.there.encoded_path.write_bytes(ENCODED)
        if result.rest:
            self.there.rest_path.write_bytes(REST)
        self.there.write_result(result)


@pytest.fixture
def both(tmp_path: Path, service: Service) -> Both:
    return Both(tmp_path, service.new_bucket())


def test_job_comes_to_the_machine_with_its_blobs(both: Both) -> None:
    both.here.write_job(JOB)
    both.steps()
    assert both.there.read_job() == JOB
    assert both.there.is_pending
    assert blob_path(both.machine.blobs, digest_of(SENT)).read_bytes() == SENT


def test_progress_and_result_come_back_and_nothing_is_left(both: Both) -> None:
    both.here.write_job(JOB)
    both.steps()
    both.there.append_progress(LINE)
    both.steps()
    assert both.here.read_progress(0)[0] == [LINE]
    assert both.here.is_pending
    both.do_job()
    both.steps()
    assert both.here.read_result() == RESULT
    assert (both.here.weights_path.read_bytes(), both.here.encoded_path.read_bytes()) == (MODEL, ENCODED)
    assert both.here.read_progress(0)[0] == [LINE, LINE]
    both.steps()
    assert not both.bucket.names("jobs")
    assert not both.there.path.exists()
    both.steps()
    assert not list(both.machine.blobs.glob("*/*"))
    # The blobs of the server stay.
    assert both.bucket.list().keys() == {digest_of(SENT)}


def test_checkpoint_comes_to_a_machine_that_takes_the_job_up_later(both: Both, tmp_path: Path) -> None:
    both.here.write_job(JOB)
    both.steps()
    both.there.checkpoint_path.parent.mkdir()
    both.there.checkpoint_path.write_bytes(b"epoch 1")
    both.relay.step()
    # The machine of rank 0 takes it back, and that one has progress.
    assert not [name for name in both.bucket.names("jobs") if name.endswith("checkpoint")]
    both.there.append_progress(LINE)
    both.relay.step()
    both.there.checkpoint_path.write_bytes(b"epoch 20")
    both.relay.step()
    later = StateDir(tmp_path / "later")
    relay = Relay(later, both.bucket)
    relay.step()
    found = JobDirectory(later.job(JOB.name))
    assert found.checkpoint_path.read_bytes() == b"epoch 20"
    assert found.is_pending
    both.do_job()
    both.steps()
    both.steps()
    assert not both.bucket.names("jobs")


def test_checkpoint_that_has_not_changed_is_not_sent_again(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    both.here.write_job(JOB)
    both.steps()
    both.there.append_progress(LINE)
    both.there.checkpoint_path.parent.mkdir()
    both.there.checkpoint_path.write_bytes(b"epoch 1")
    sent = []
    put_file = Bucket.put_file
    monkeypatch.setattr(
        Bucket, "put_file", lambda self, path, name: sent.append(path.name) or put_file(self, path, name)
    )
    both.relay.step()
    both.relay.step()
    assert sent == ["progress.jsonl", "latest.safetensors"]


def test_rest_and_the_starts_of_stale_weights_come_to_the_machine(both: Both, tmp_path: Path) -> None:
    initial, rest, start = (both.put(name, tmp_path / "blob") for name in (b"initial", REST, b"earlier"))
    stale = Contribution("a", digest_of(SENT), (), 1, start, staleness=2)
    job = JOB.model_copy(update={"initial_weights": initial, "initial_rest": rest, "contributions": (stale,)})
    both.here.write_job(job)
    both.steps()
    assert both.there.read_job() == job
    brought = {path.name for path in both.machine.blobs.glob("*/*")}
    assert brought == {digest_of(SENT), initial, rest, start}
    # What a job reads stays as long as the job.
    both.steps()
    assert {path.name for path in both.machine.blobs.glob("*/*")} == brought


def test_rest_of_the_new_model_comes_back(both: Both) -> None:
    result = RESULT.model_copy(update={"rest": WeightsFile(sha256=digest_of(REST), bytes=len(REST))})
    both.here.write_job(JOB)
    both.steps()
    both.do_job(result)
    both.steps()
    assert both.here.read_result() == result
    assert both.here.rest_path.read_bytes() == REST


def test_job_that_is_only_traced_anew_is_the_same_job(both: Both) -> None:
    """A server that starts again names another span, and the work of the machines goes on."""
    both.here.write_job(JOB.model_copy(update={"traceparent": "00-1-2-01"}))
    both.steps()
    both.there.append_progress(LINE)
    both.here.write_job(JOB.model_copy(update={"traceparent": "00-1-3-01"}))
    both.steps()
    assert both.here.read_progress(0)[0] == [LINE]


def test_job_that_is_withdrawn_leaves_the_machine(both: Both) -> None:
    both.here.write_job(JOB)
    both.steps()
    both.do_job()
    both.here.withdraw()
    both.steps()
    both.steps()
    assert not both.bucket.names("jobs")
    assert not list(both.machine.jobs.iterdir())
    assert not list(both.machine.blobs.glob("*/*"))
    assert both.here.read_result() is None


def test_result_of_another_attempt_is_not_taken(both: Both) -> None:
    both.here.write_job(JOB)
    both.steps()
    both.do_job(Result(error=JobError(kind="failed", message="no")))
    both.steps()
    assert both.here.read_result().error.message == "no"
    both.here.write_job(JOB.model_copy(update={"attempt": 2}))
    both.steps()
    assert both.here.read_result() is None
    assert both.there.read_job().attempt == 2
    both.do_job()
    both.steps()
    assert both.here.read_result() == RESULT


def test_damaged_result_is_not_taken(both: Both) -> None:
    both.here.write_job(JOB)
    both.steps()
    both.do_job()
    both.there.weights_path.write_bytes(MODEL[::-1])
    both.relay.step()
    with pytest.raises(StorageError, match="is damaged"):
        both.hand_out.step()
    assert both.here.read_result() is None


def test_jobs_of_an_earlier_life_go(both: Both, tmp_path: Path) -> None:
    both.here.write_job(JOB)
    both.steps()
    shutil.rmtree(both.here.path)
    HandOut(both.server, both.bucket).step()
    assert not both.bucket.names("jobs")


async def test_external_trainers_hand_out_and_take_back(both: Both) -> None:
    trainers = ExternalTrainers(both.server.path, both.bucket)
    both.here.write_job(JOB)
    await trainers.restart()
    assert len(both.bucket.names("jobs")) == 1
    both.here.withdraw()
    await trainers.start()
    await trainers.stop()
    await trainers.stop()
    assert not both.bucket.names("jobs")
    assert trainers.num_exits == 0


async def test_external_trainers_that_share_the_folder_need_no_bucket(tmp_path: Path) -> None:
    trainers = ExternalTrainers(tmp_path, None)
    await trainers.start()
    await trainers.restart()
    await trainers.stop()


def test_object_under_another_name_than_its_jobs_is_not_brought(both: Both, tmp_path: Path) -> None:
    stray = tmp_path / "job.json"
    stray.write_text(JOB.model_copy(update={"name": "../../stray"}).model_dump_json())
    both.bucket.put_file(stray, "jobs/round-0001/0123456789abcdef/job.json")
    with pytest.raises(RunError, match="is no job of this version"):
        both.relay.step()
    assert not list(both.machine.jobs.iterdir())


def test_blobs_that_came_before_a_failure_are_not_brought_again(
    both: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = Contribution("b", "0" * 64, (), 1)
    both.here.write_job(JOB.model_copy(update={"contributions": (*JOB.contributions, missing)}))
    both.hand_out.step()
    brought = []
    fetch = Bucket.fetch
    monkeypatch.setattr(
        Bucket, "fetch", lambda self, blob, path: brought.append(blob.digest) or fetch(self, blob, path)
    )
    for _ in range(2):
        with pytest.raises(StorageError):
            both.relay.step()
    assert brought == [digest_of(SENT)]


def test_relay_goes_on_after_a_failure(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    both.here.write_job(JOB)
    both.hand_out.step()
    with monkeypatch.context() as broken:
        broken.setattr(Bucket, "fetch", lambda *_: (_ for _ in ()).throw(StorageError("away")))
        both.relay.try_step()
    assert not both.there.is_begun
    both.relay.try_step()
    assert both.there.is_pending


def test_command_runs_a_relay(both: Both, service: Service, tmp_path: Path, monkeypatch) -> None:
    both.here.write_job(JOB)
    both.hand_out.step()

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(relay_module.time, "sleep", stop)
    relay_module.main(["--bucket", both.bucket.url, "--state-dir", str(both.machine.path)])
    assert both.there.is_pending


# The ranks of several machines


def test_rank_waits_until_its_machine_has_the_job_of_rank_0(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    both.there.write_job(JOB.model_copy(update={"attempt": 2}))
    waits = []

    def arrive(seconds: float) -> None:
        waits.append(seconds)
        both.there.write_job(JOB)

    monkeypatch.setattr(trainer.time, "sleep", arrive)
    trainer._await_job(both.there, JOB.id)
    assert len(waits) == 1


def test_job_that_does_not_come_is_an_error(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "ARRIVAL_SECONDS", -1.0)
    with pytest.raises(RunError, match="did not come"):
        trainer._await_job(both.there, JOB.id)
    # A job that rank 0 could not read is not waited for.
    trainer._await_job(both.there, "")


def test_job_that_rank_0_finds_is_named_with_its_id(both: Both) -> None:
    both.here.write_job(JOB)
    assert trainer._next_job(both.server.jobs) == f"{JOB.name} {JOB.id}"
    both.here.job_path.write_text("damaged")
    assert trainer._next_job(both.server.jobs) == f"{JOB.name} "


LOST = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3")


@pytest.mark.parametrize(
    ("error", "world_size", "is_written"),
    [(LOST, 2, False), (DistNetworkError("no"), 2, False), (RuntimeError("no"), 2, True), (LOST, 1, True)],
)
def test_job_stays_pending_where_another_rank_is_gone(
    both: Both, monkeypatch: pytest.MonkeyPatch, error: Exception, world_size: int, is_written: bool
) -> None:
    def fail(*_: object) -> Result:
        raise error

    monkeypatch.setattr(work, "_do", fail)
    both.there.write_job(JOB)
    with suppress(RuntimeError):
        group = Group(1, world_size)
        work.run_job(both.there, blobs_dir=both.machine.blobs, device_name="cpu", group=group)
    assert both.there.is_pending != is_written


def test_torchrun_that_could_not_form_the_group_anew_is_refused() -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with pytest.raises(UsageError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        Group.join("cpu", environ)


@pytest.mark.parametrize(
    ("error", "is_kept"), [(ValueError("no"), True), (OSError(errno.ENOSPC, "full"), False)]
)
def test_checkpoint_makes_room_on_a_full_disk(
    both: Both, monkeypatch: pytest.MonkeyPatch, error: Exception, is_kept: bool
) -> None:
    def fail(*_: object) -> Result:
        raise error

    monkeypatch.setattr(work, "_do", fail)
    both.there.write_job(JOB)
    both.there.checkpoint_path.parent.mkdir()
    both.there.checkpoint_path.write_bytes(b"epoch 1")
    work.run_job(both.there, blobs_dir=both.machine.blobs, device_name="cpu", group=Group())
    assert both.there.checkpoint_path.exists() == is_kept
