"""Where things are in a state directory."""

from pathlib import Path

import pytest

from ecavg.cloud_server.config import ServerConfig
from ecavg.cloud_server.jobs import JobDirectory, round_job, round_jobs
from ecavg.cloud_server.state_dir import StateDir, blob_path

DIGEST = "ab" * 32


def test_each_round_and_job_has_a_folder_of_its_own(tmp_path: Path) -> None:
    state_dir = StateDir(tmp_path)
    assert state_dir.report(3) == tmp_path / "rounds/0003/report.json"
    assert state_dir.model(12345) == tmp_path / "rounds/12345/model.safetensors"
    assert state_dir.job("initialise") == tmp_path / "jobs/initialise"
    assert round_job(state_dir, 3).path == tmp_path / "jobs/round-0003"
    assert round_job(state_dir, 3).precision_path == state_dir.precision


def test_jobs_of_rounds_are_found_by_their_names(tmp_path: Path) -> None:
    for name in ("round-0003", "round-12345", "initialise", "round-3x", "round-"):
        (tmp_path / "jobs" / name).mkdir(parents=True)
    found = dict(round_jobs(StateDir(tmp_path)))
    assert found == {
        3: JobDirectory(tmp_path / "jobs/round-0003"),
        12345: JobDirectory(tmp_path / "jobs/round-12345"),
    }


def test_authority_and_token_are_where_the_configuration_says_or_in_the_state(tmp_path: Path) -> None:
    state_dir = StateDir(tmp_path)
    config = ServerConfig(state_dir=tmp_path)
    assert (config.tls_folder, config.http_token_path) == (state_dir.tls, state_dir.http_token)
    elsewhere = ServerConfig(state_dir=tmp_path, tls_dir=Path("a"), http_token_file=Path("b"))
    assert (elsewhere.tls_folder, elsewhere.http_token_path) == (Path("a"), Path("b"))


def test_blobs_are_found_by_their_digest(tmp_path: Path) -> None:
    assert blob_path(tmp_path, DIGEST) == tmp_path / "ab" / DIGEST


@pytest.mark.parametrize("text", ["", "ab", "../" + DIGEST, DIGEST.upper(), DIGEST + "\n", "g" + DIGEST[1:]])
def test_only_digests_name_blobs(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="no digest"):
        blob_path(tmp_path, text)
