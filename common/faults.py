"""Where a process may die: each durable step, and the middle of each transfer, has a name.

In a test, `ECAVG_CRASH_AT=POINT:COUNT:FILE` kills the process with SIGKILL when it comes to POINT for the
COUNTth time; FILE, made at that moment, keeps the next process from dying there again. Without the
variable a crash point costs one comparison.
"""

import os
import signal
from enum import StrEnum
from pathlib import Path


class Point(StrEnum):
    """In the order in which a round comes to them."""

    SERVER_CA_KEY_WRITTEN = "server_ca_key_written"  # but not yet its certificate
    AGENT_KEY_WRITTEN = "agent_key_written"  # but not yet enrolled
    SERVER_ENROLMENT_RECORDED = "server_enrolment_recorded"  # but not yet answered
    AGENT_ENROLLED = "agent_enrolled"  # answered, but not yet remembered
    SERVER_RUN_CREATED = "server_run_created"
    SERVER_AGENT_JOINED = "server_agent_joined"
    AGENT_JOINED = "agent_joined"
    AGENT_DATA_LOADED = "agent_data_loaded"
    SERVER_CHUNK_SENT = "server_chunk_sent"
    AGENT_CHUNK_RECEIVED = "agent_chunk_received"
    AGENT_DECODED = "agent_decoded"  # but not yet known to be what was published
    AGENT_DOWNLOADED = "agent_downloaded"
    AGENT_EPOCH_SAVED = "agent_epoch_saved"
    AGENT_WEIGHTS_WRITTEN = "agent_weights_written"  # but not yet known to be trained
    AGENT_PRETRAINED = "agent_pretrained"
    AGENT_ENCODED = "agent_encoded"  # what is lost of it is in a file that is not yet the one to be added
    AGENT_CHUNK_SENT = "agent_chunk_sent"
    SERVER_CHUNK_STORED = "server_chunk_stored"
    SERVER_BLOB_LINKED = "server_blob_linked"  # but not yet recorded
    SERVER_UPLOAD_RECORDED = "server_upload_recorded"
    AGENT_UPLOADED = "agent_uploaded"
    SERVER_CONTRIBUTION_RECORDED = "server_contribution_recorded"  # but not yet acknowledged
    AGENT_CONTRIBUTED = "agent_contributed"  # acknowledged, but not yet remembered
    AGENT_CONTRIBUTION_SAVED = "agent_contribution_saved"
    SERVER_PHASE_RECORDED = "server_phase_recorded"  # aggregating, fine-tuning, evaluating, published
    SERVER_JOB_WRITTEN = "server_job_written"
    TRAINER_JOB_TAKEN = "trainer_job_taken"
    TRAINER_TENSOR_AVERAGED = "trainer_tensor_averaged"
    TRAINER_STEP_DONE = "trainer_step_done"
    TRAINER_FINE_TUNED = "trainer_fine_tuned"
    TRAINER_WEIGHTS_WRITTEN = "trainer_weights_written"
    TRAINER_RESULT_WRITTEN = "trainer_result_written"
    SERVER_MODEL_ADOPTED = "server_model_adopted"  # but not yet published
    SERVER_ENCODED_MODEL_ADOPTED = "server_encoded_model_adopted"  # and recorded
    SERVER_REPORT_WRITTEN = "server_report_written"
    SERVER_ROUND_OPENED = "server_round_opened"
    AGENT_ADAPTED = "agent_adapted"  # but not yet compared
    AGENT_EVALUATED = "agent_evaluated"
    AGENT_MODEL_APPLIED = "agent_model_applied"  # but not yet reported
    SERVER_AGENT_REPORT_RECORDED = "server_agent_report_recorded"  # but not yet acknowledged
    AGENT_REPORTED = "agent_reported"  # acknowledged, but not yet remembered
    # And where an agent is forgotten, by the server or by `cloud-server forget`:
    SERVER_FORGETTING_ASKED = "server_forgetting_asked"  # recorded, and nothing else
    SERVER_AGENT_RECORDS_REMOVED = "server_agent_records_removed"  # but not yet its blobs
    SERVER_AGENT_BLOBS_REMOVED = "server_agent_blobs_removed"  # but it is still named in files
    SERVER_AGENT_STRUCK_OUT = "server_agent_struck_out"  # but the intent still names it


class _Armed:
    """The one point at which this process is to die."""

    def __init__(self, plan: str) -> None:
        self.point, count, marker = [*plan.split(":", 2), "", "", ""][:3]
        self._left = int(count or 1)
        self._marker = Path(marker)

    def reach(self) -> None:
        self._left -= 1
        if self._left == 0 and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


_armed = _Armed(os.environ.get("ECAVG_CRASH_AT", ""))


def crash_point(point: Point) -> None:
    """Die here, if this is where a test wants it."""
    if point == _armed.point:
        _armed.reach()
