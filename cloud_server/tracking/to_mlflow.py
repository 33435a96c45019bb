"""MLflow: one run with the metrics of all rounds, and a version in its model registry for each model.

The run is found by the tag `ecavg.run_id`, so that a server that starts again goes on with it. The tag
`ecavg.round` has the last round of which all was written; of the rounds after it, what is there is not
written again. Everything happens by MLflow's client, with the user's own MLFLOW_ variables.
"""

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ecavg.cloud_server.tracking.facts import Facts, RunFacts

EXPERIMENT = "ecavg"
RUN_ID_TAG = "ecavg.run_id"
ROUND_TAG = "ecavg.round"
_BATCH = 100
# Variables that MLflow reads when it is imported, and their values here unless the user has set them.
_DEFAULTS = {
    # A tracker that is down is asked again later anyway.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # MLflow tells its makers who uses what, unless it is told not to.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # The server's stdout is for what its user has asked for.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class MLflow:
    """A run of MLflow's, on a tracking server, in a database or in a folder."""

    name = "mlflow"

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._client: Any = None
        self._run_id = ""
        self._artifact_uri = ""
        self._model_name = ""
        # The last round of which all but the edges' part was written.
        self._round = -1

    def open(self, run: RunFacts) -> int:
        """Find the run by its tag, or begin it; return the last round that was written."""
        self._client = _connect(self._uri)
        found = self._find(run)
        self._run_id, self._artifact_uri = found.info.run_id, found.info.artifact_uri
        self._model_name = run.name
        self._log_parameters(
            {key: value for key, value in run.parameters.items() if key not in found.data.params}
        )
        self._client.update_run(self._run_id, status="RUNNING")
        self._round = int(found.data.tags.get(ROUND_TAG, -1))
        return self._round

    def write(self, facts: Facts) -> None:
        """Log the metrics, the report and the model of a round that are not there."""
        from mlflow.entities import Metric

        at = round(facts.at * 1000)
        metrics = [
            Metric(name, value, at, facts.round)
            for name, value in facts.metrics.items()
            if not self._has_point(name, facts.round)
        ]
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics)
        if facts.report is not None and facts.round > self._round:
            self._log_artifacts(facts)
            self._client.set_tag(self._run_id, ROUND_TAG, str(facts.round))
            self._round = facts.round

    def finish(self) -> None:
        """Say that the run is over."""
        self._client.set_terminated(self._run_id)

    def _find(self, run: RunFacts) -> Any:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        known = self._client.get_experiment_by_name(experiment)
        experiment_id = known.experiment_id if known else self._client.create_experiment(experiment)
        found = self._client.search_runs([experiment_id], f"tags.`{RUN_ID_TAG}` = '{run.run_id}'")
        if found:
            return found[0]
        return self._client.create_run(
            experiment_id, tags={RUN_ID_TAG: run.run_id}, run_name=f"{run.name}-{run.run_id[:12]}"
        )

    def _log_parameters(self, parameters: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        items = [Param(key, value) for key, value in parameters.items()]
        for first in range(0, len(items), _BATCH):
            self._client.log_batch(self._run_id, params=items[first : first + _BATCH])

    def _has_point(self, name: str, step: int) -> bool:
        """Return True if the run has a value of this metric for this round."""
        return any(point.step == step for point in self._client.get_metric_history(self._run_id, name))

    def _log_artifacts(self, facts: Facts) -> None:
        folder = f"rounds/{facts.round:04d}"
        with tempfile.TemporaryDirectory() as scratch:
            report = Path(scratch) / "report.json"
            report.write_text(json.dumps(facts.report, indent=2) + "\n", "utf-8")
            self._client.log_artifact(self._run_id, str(report), folder)
        if facts.rest:
            self._client.log_artifact(self._run_id, str(facts.rest), folder)
        if facts.model:
            self._client.log_artifact(self._run_id, str(facts.model), folder)
            self._register(f"{self._artifact_uri}/{folder}", facts.provenance)

    def _register(self, source: str, provenance: Mapping[str, str]) -> None:
        """Make a version of the registered model, unless this round has one."""
        from mlflow.exceptions import MlflowException

        name = self._model_name
        try:
            self._client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self._client.create_registered_model(name)
        versions = self._client.search_model_versions(f"name = '{name}' and run_id = '{self._run_id}'")
        if not any(version.tags.get("round") == provenance["round"] for version in versions):
            self._client.create_model_version(name, source, self._run_id, tags=dict(provenance))


def _connect(uri: str) -> Any:
    """Return a client of MLflow's, whose import takes a second and reads variables of the environment."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    # The log says once that a tracker is down; these would say it at every try.
    for logger in ("urllib3.connectionpool", "mlflow"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)
