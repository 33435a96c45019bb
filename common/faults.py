"""Crash points: named places at which a test can kill a process.

Each durable step, and the middle of each transfer, has a crash point. In a test,
`ECAVG_CRASH_AT=POINT:COUNT:FILE` makes the process send SIGKILL to itself when it reaches POINT for the
COUNTth time. The process creates FILE just before, and no process dies while FILE exists, so that the
restarted process passes the point. Without the variable, a crash point costs one comparison.
"""

import os
import signal
from enum import StrEnum
from pathlib import Path


class Point(StrEnum):
    """The crash points, in the order in which a round reaches them."""

    # The CA's certificate does not exist yet.
    SERVER_CA_KEY_WRITTEN = "server_ca_key_written"
    # The agent has not enrolled yet.
    AGENT_KEY_WRITTEN = "agent_key_written"
    # The server has not answered the agent yet.
    SERVER_ENROLMENT_RECORDED = "server_enrolment_recorded"
    # The agent has the server's answer, but has not stored it yet.
    AGENT_ENROLLED = "agent_enrolled"
    SERVER_RUN_CREATED = "server_run_created"
    SERVER_AGENT_JOINED = "server_agent_joined"
    AGENT_JOINED = "agent_joined"
    AGENT_DATA_LOADED = "agent_data_loaded"
    SERVER_CHUNK_SENT = "server_chunk_sent"
    AGENT_CHUNK_RECEIVED = "agent_chunk_received"
    # The agent has not yet compared the decoded file with the published digest.
    AGENT_DECODED = "agent_decoded"
    AGENT_DOWNLOADED = "agent_downloaded"
    AGENT_EPOCH_SAVED = "agent_epoch_saved"
    # The agent has not yet recorded that the pre-training is complete.
    AGENT_WEIGHTS_WRITTEN = "agent_weights_written"
    AGENT_PRETRAINED = "agent_pretrained"
    # The rounding residual is in a new file, which has not replaced the file of the last round yet.
    AGENT_ENCODED = "agent_encoded"
    AGENT_CHUNK_SENT = "agent_chunk_sent"
    SERVER_CHUNK_STORED = "server_chunk_stored"
    # The blob has no file and no record yet. A server reaches this point only with a bucket.
    SERVER_BLOB_IN_BUCKET = "server_blob_in_bucket"
    # The database has no record of the blob yet.
    SERVER_BLOB_LINKED = "server_blob_linked"
    SERVER_UPLOAD_RECORDED = "server_upload_recorded"
    AGENT_UPLOADED = "agent_uploaded"
    # The server has not acknowledged the contribution yet.
    SERVER_CONTRIBUTION_RECORDED = "server_contribution_recorded"
    # The agent has the acknowledgement, but has not stored it yet.
    AGENT_CONTRIBUTED = "agent_contributed"
    AGENT_CONTRIBUTION_SAVED = "agent_contribution_saved"
    # The server reaches this point for each phase after COLLECTING.
    SERVER_PHASE_RECORDED = "server_phase_recorded"
    SERVER_JOB_WRITTEN = "server_job_written"
    TRAINER_JOB_TAKEN = "trainer_job_taken"
    TRAINER_TENSOR_AVERAGED = "trainer_tensor_averaged"
    TRAINER_STEP_DONE = "trainer_step_done"
    TRAINER_FINE_TUNED = "trainer_fine_tuned"
    TRAINER_WEIGHTS_WRITTEN = "trainer_weights_written"
    TRAINER_RESULT_WRITTEN = "trainer_result_written"
    # The model is among the blobs, but is not published yet.
    SERVER_MODEL_ADOPTED = "server_model_adopted"
    # The encoded model is among the blobs, and the database has a record of it.
    SERVER_ENCODED_MODEL_ADOPTED = "server_encoded_model_adopted"
    SERVER_REPORT_WRITTEN = "server_report_written"
    SERVER_ROUND_OPENED = "server_round_opened"
    # No agent has been told yet whether it is drawn.
    SERVER_SAMPLE_DRAWN = "server_sample_drawn"
    # The agent has not compared the adapted model with the others yet.
    AGENT_ADAPTED = "agent_adapted"
    AGENT_EVALUATED = "agent_evaluated"
    # The agent has not reported to the server yet.
    AGENT_MODEL_APPLIED = "agent_model_applied"
    # The server has not acknowledged the agent's report yet.
    SERVER_AGENT_REPORT_RECORDED = "server_agent_report_recorded"
    # The agent has the acknowledgement, but has not stored it yet.
    AGENT_REPORTED = "agent_reported"
    # No agent has been told yet whether the model is released or withdrawn.
    SERVER_CANARY_DECIDED = "server_canary_decided"
    # The agent uses an older model than the withdrawn one, and has not reported that yet.
    AGENT_WENT_BACK = "agent_went_back"
    # The last four points belong to the forgetting of an agent, by the server or by `cloud-server forget`.
    # The database has a record of the intent, and nothing is deleted yet.
    SERVER_FORGETTING_ASKED = "server_forgetting_asked"
    # The agent's blobs still exist.
    SERVER_AGENT_RECORDS_REMOVED = "server_agent_records_removed"
    # Other files still contain the agent's id.
    SERVER_AGENT_BLOBS_REMOVED = "server_agent_blobs_removed"
    # The recorded intent still contains the agent's id.
    SERVER_AGENT_STRUCK_OUT = "server_agent_struck_out"


class _Armed:
    """The crash point at which this process is to die."""

    def __init__(self, plan: str) -> None:
        self.point, count, marker = [*plan.split(":", 2), "", "", ""][:3]
        self._left = int(count or 1)
        self._marker = Path(marker)

    def reach(self) -> None:
        """Count one arrival at the point, and kill the process at the last one."""
        self._left -= 1
        if self._left == 0 and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


_armed = _Armed(os.environ.get("ECAVG_CRASH_AT", ""))


def crash_point(point: Point) -> None:
    """Kill this process if a test has asked for its death at `point`."""
    if point == _armed.point:
        _armed.reach()
