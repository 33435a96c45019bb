import subprocess
import sys

import pytest

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.jobs import (
    Job,
    JobDirectory,
    JobError,
    Progress,
    Result,
    WeightsFile,
    pending_jobs,
)
from ecavg.common.config import RunConfig
from ecavg.common.errors import RunError

DIGEST = "ab" + "0123456789abcdef" * 3 + "0" * 14

JOB = Job(
    kind="round",
    name="round-0001",
    round=1,
    run=RunConfig(),
    device="auto",
    initial_weights=DIGEST,
    contributions=(Contribution("a", DIGEST, (DIGEST,), 7),),
)
RESULT = Result(
    weights=WeightsFile(sha256=DIGEST, bytes=1),
    candidates={"average": 0.5},
    start="average",
    score_fine_tuned=0.75,
    score_published=0.75,
    seconds={"aggregate": 0.5},
    num_parameters=10,
)
FAILED = Result(error=JobError(kind="failed", message="no luck"))


@pytest.fixture
def directory(tmp_path):
    return JobDirectory(tmp_path / "jobs" / JOB.name)


def step(done: int, loss: float | None = None) -> Progress:
    return Progress(phase="fine_tuning", done=done, total=3, loss=loss)


def test_job_and_result_come_back_as_they_were(directory):
    directory.write_job(JOB)
    assert directory.read_job() == JOB
    assert directory.read_result() is None
    directory.write_result(RESULT)
    assert directory.read_result() == RESULT


def test_nothing_but_the_named_files_is_left(directory):
    directory.write_job(JOB)
    directory.append_progress(step(1))
    directory.write_result(RESULT)
    assert {path.name for path in directory.path.iterdir()} == {"job.json", "progress.jsonl", "result.json"}


def test_a_job_is_pending_from_job_to_result(directory):
    jobs_dir = directory.path.parent
    assert pending_jobs(jobs_dir) == []
    directory.path.mkdir(parents=True)
    assert pending_jobs(jobs_dir) == []
    directory.write_job(JOB)
    assert pending_jobs(jobs_dir) == [directory]
    directory.write_result(RESULT)
    assert pending_jobs(jobs_dir) == []


def test_jobs_are_done_in_the_order_of_their_names(tmp_path):
    for name in ("round-0002", "initialise", "round-0001"):
        JobDirectory(tmp_path / name).write_job(JOB)
    assert [directory.path.name for directory in pending_jobs(tmp_path)] == [
        "initialise",
        "round-0001",
        "round-0002",
    ]


def test_a_new_attempt_is_pending_and_shows_nothing_of_the_old(directory):
    directory.write_job(JOB)
    directory.append_progress(step(1))
    directory.write_result(FAILED)
    directory.write_job(JOB.model_copy(update={"attempt": 2}))
    assert pending_jobs(directory.path.parent) == [directory]
    assert directory.read_job().attempt == 2
    assert directory.read_progress(0) == ([], 0)
    assert directory.read_result() is None


def test_an_attempt_that_was_killed_leaves_nothing_to_the_next(directory):
    directory.write_job(JOB)
    directory.append_progress(step(1))
    directory.weights_path.write_bytes(b"half of a model")
    directory.discard_output()
    assert [path.name for path in directory.path.iterdir()] == ["job.json"]
    directory.discard_output()


def test_progress_is_read_on_from_where_it_was(directory):
    directory.write_job(JOB)
    directory.append_progress(step(1, 0.5))
    directory.append_progress(step(2, 0.25))
    lines, offset = directory.read_progress(0)
    assert lines == [step(1, 0.5), step(2, 0.25)]
    assert directory.read_progress(offset) == ([], offset)
    directory.append_progress(step(3, 0.125))
    assert directory.read_progress(offset)[0] == [step(3, 0.125)]


def test_half_a_line_waits_for_its_other_half(directory):
    directory.write_job(JOB)
    directory.append_progress(step(1))
    path = directory.path / "progress.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:10])
    lines, offset = directory.read_progress(0)
    assert (lines, offset) == ([step(1)], len(whole))
    path.write_bytes(whole + whole)
    assert directory.read_progress(offset) == ([step(1)], 2 * len(whole))


def test_progress_that_was_begun_anew_is_read_from_its_start(directory):
    directory.write_job(JOB)
    for done in (1, 2, 3):
        directory.append_progress(step(done))
    _, offset = directory.read_progress(0)
    directory.discard_output()
    assert directory.read_progress(offset) == ([], 0)
    directory.append_progress(step(1))
    assert directory.read_progress(offset)[0] == [step(1)]


def test_an_offset_within_a_line_skips_that_line_only(directory):
    directory.write_job(JOB)
    directory.append_progress(step(1))
    directory.append_progress(step(2))
    assert directory.read_progress(5)[0] == [step(2)]


def test_a_loss_that_is_not_finite_is_left_out(directory):
    directory.write_job(JOB)
    directory.append_progress(step(1, float("nan")))
    directory.append_progress(step(2, float("inf")))
    assert directory.read_progress(0)[0] == [step(1), step(2)]


@pytest.mark.parametrize("text", ["", "{", '{"kind": "round"}', '{"unknown": 1}', "\0\0"])
def test_damaged_files_are_named(directory, text):
    directory.write_job(JOB)
    (directory.path / "job.json").write_text(text)
    with pytest.raises(RunError, match=r"job\.json is damaged"):
        directory.read_job()
    (directory.path / "result.json").write_text(text)
    with pytest.raises(RunError, match=r"result\.json is damaged"):
        directory.read_result()


def test_a_job_that_is_not_there_is_named(directory):
    with pytest.raises(RunError, match=r"job\.json is missing"):
        directory.read_job()


def test_the_serving_side_does_not_import_torch():
    program = "import sys, ecavg.cloud_server.jobs, ecavg.cloud_server.training.supervisor; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert output.stdout.strip() == "False"
