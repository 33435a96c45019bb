"""The models that were in use on this device, the last of them with their files.

The last entry is the model in use. What is written here is whole or as before, and a step that a crash has
cut off may be taken again.
"""

import time
from collections.abc import Collection, Sequence
from enum import StrEnum
from pathlib import Path

from ecavg.common.config import FrozenModel, RunConfig
from ecavg.common.errors import UsageError
from ecavg.common.files import link, replacing
from ecavg.common.sharded import remove_sharded, write_sharded
from ecavg.common.transfer import blob_of

# So many entries stay; an entry has a few hundred bytes.
MAX_ENTRIES = 200


class Source(StrEnum):
    """Where a model in use has come from."""

    # This device has trained it for a round.
    PRE_TRAINED = "pre-trained"
    # The server has published it.
    PUBLISHED = "published"
    # The server has published it, and this device has adapted it.
    ADAPTED = "adapted"
    # It was in use before, and is so again.
    ROLLED_BACK = "rolled-back"


class Use(FrozenModel):
    """One model that was, or is, in use."""

    run_id: str
    round: int
    source: Source
    # The SHA-256 of the file of weights.
    digest: str
    # The score of the model in use before, on the held-out data of this device; None: there was none.
    score_before: float | None
    # The score of this model; None: it is not known any more.
    score: float | None
    # What the score is called.
    metric: str = "accuracy"
    # When it came into use, in seconds since the epoch.
    at: float
    # True if the export is written and `on_update` has run.
    is_told: bool = False
    # How that failed; empty if it did not.
    failure: str = ""


class _Entries(FrozenModel):
    uses: tuple[Use, ...] = ()


class History:
    """The folder `models` of a state directory, and `model.safetensors` beside it.

    Args:
        state_path: the state directory.
        keep_models: how many models keep their files.
        max_file_bytes: a model in use with more bytes is written as several files as well; None: none is.
    """

    def __init__(self, state_path: Path, keep_models: int, max_file_bytes: int | None = None) -> None:
        self._folder = state_path / "models"
        self._model = state_path / "model.safetensors"
        # The index of the model in use in several files.
        self._index = state_path / "model.safetensors.index.json"
        self._keep_models = keep_models
        self._max_file_bytes = max_file_bytes

    def uses(self) -> tuple[Use, ...]:
        """Return the models that were in use, oldest first.

        Raises:
            UsageError: the file is damaged.
        """
        try:
            return _Entries.model_validate_json(self._file.read_bytes()).uses
        except FileNotFoundError:
            return ()
        except ValueError as error:
            raise UsageError(
                f"{self._file} is damaged; remove it: only what the device remembers of older models is lost"
            ) from error

    def latest(self) -> Use:
        """Return the model in use.

        Raises:
            UsageError: there is none.
        """
        if uses := self.uses():
            return uses[-1]
        raise UsageError(
            f"no model is in use in {self._model.parent} yet: name the right --state-dir, or start the agent"
        )

    def weights(self, use: Use) -> Path:
        """Return the path of a model's weights, which are never changed there."""
        return self._folder / f"{use.digest}.safetensors"

    def run_of(self, use: Use) -> RunConfig:
        """Return the configuration that the model is built by; raise UsageError if it is not kept."""
        path = self._run_file(use)
        try:
            return RunConfig.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} is missing or damaged: the next model brings it back") from error

    def is_kept(self, use: Use) -> bool:
        """Return True if the model can be taken again."""
        return self.weights(use).exists()

    def take(self, weights: Path, run: RunConfig, use: Use) -> None:
        """Use a model from now on; to do it again right afterwards changes nothing.

        Args:
            weights: the file, which is not written to any more; its SHA-256 is the digest of `use`.
            run: the configuration that the model is built by.
        """
        self._folder.mkdir(exist_ok=True)
        with replacing(self._run_file(use)) as partial:
            partial.write_text(run.model_dump_json(), "utf-8")
        link(weights, self.weights(use))
        self._switch_to(use)
        uses = self.uses()
        if not (uses and _is_same(uses[-1], use)):
            self._write((*uses, use))

    def mark_told(self, failure: str = "") -> None:
        """Record of the model in use that all who use it were told of it, or how that failed."""
        *before, latest = self.uses()
        self._write((*before, latest.model_copy(update={"is_told": True, "failure": failure})))

    def roll_back(self, number: int | None = None, failure: str = "") -> Use | None:
        """Use a model that was in use before; return its entry, or None if no such model is kept.

        Args:
            number: the round of the model; None: the one before the model in use.
            failure: why the model in use is given up, which is recorded with it.
        """
        uses = self.uses()
        found = self._find(uses, number)
        if found is None:
            return None
        return self._restore(uses, found, failure)

    def go_back(self, run_id: str, withdrawn: Collection[int]) -> Use | None:
        """Use the model again that was in use before, if the server has withdrawn the model in use.

        Args:
            run_id: the run of the server.
            withdrawn: the rounds of that run whose models are not to be used.

        Returns:
            The entry of the model that is in use again; None: the model in use stays, because it is not
            withdrawn, or because no other model is kept.
        """
        uses = self.uses()
        if not self.is_withdrawn(run_id, withdrawn):
            return None
        latest = uses[-1]
        for use in reversed(uses):
            is_other = use.digest != latest.digest and self.is_kept(use)
            if is_other and not _is_of(uses, use, run_id, withdrawn):
                return self._restore(uses, use, "the server has withdrawn the model")
        return None

    def is_withdrawn(self, run_id: str, withdrawn: Collection[int]) -> bool:
        """Return True if the model in use is the published model of one of these rounds, adapted or not."""
        uses = self.uses()
        return bool(uses) and _is_of(uses, uses[-1], run_id, withdrawn)

    def _restore(self, uses: tuple[Use, ...], found: Use, failure: str) -> Use:
        """Use a kept model again, and return its entry."""
        *before, latest = uses
        given_up = latest.model_copy(update={"is_told": latest.is_told or bool(failure), "failure": failure})
        restored = found.model_copy(
            update={
                "source": Source.ROLLED_BACK,
                # Figures of two tasks cannot be compared.
                "score_before": latest.score if latest.metric == found.metric else None,
                "at": time.time(),
                "is_told": False,
                "failure": "",
            }
        )
        self._switch_to(restored)
        self._write((*before, given_up, restored))
        return restored

    @property
    def _file(self) -> Path:
        return self._folder / "history.json"

    def _run_file(self, use: Use) -> Path:
        return self._folder / f"{use.digest}.json"

    def _find(self, uses: tuple[Use, ...], number: int | None) -> Use | None:
        """Return the newest other model that is kept: of the round, or older than the model in use."""
        digests = [use.digest for use in uses]
        latest = digests[-1] if digests else ""
        end = digests.index(latest) if digests and number is None else len(uses)
        for use in reversed(uses[:end]):
            if use.digest != latest and number in (None, use.round) and self.is_kept(use):
                return use
        return None

    def _switch_to(self, use: Use) -> None:
        link(self.weights(use), self._model)
        if self._max_file_bytes and self._model.stat().st_size > self._max_file_bytes:
            write_sharded(self._model, self._index, self._max_file_bytes)
        else:
            # An index that is left would be read as the model in use.
            remove_sharded(self._index)

    def _write(self, uses: tuple[Use, ...]) -> None:
        """Record the entries, and remove the files of models that are not kept any more."""
        uses = uses[-MAX_ENTRIES:]
        with replacing(self._file) as partial:
            partial.write_text(_Entries(uses=uses).model_dump_json(indent=1), "utf-8")
        kept = list(dict.fromkeys(use.digest for use in reversed(uses)))[: self._keep_models]
        for path in self._folder.iterdir():
            if path != self._file and path.stem not in kept:
                path.unlink(missing_ok=True)


def use_of(weights: Path, run_id: str, number: int, source: Source, scores: Sequence[float | None]) -> Use:
    """Return the entry of a model that is about to come into use.

    Args:
        weights: the file of the model.
        scores: of the model before, and of this one.
    """
    before, score = scores
    return Use(
        run_id=run_id,
        round=number,
        source=source,
        digest=blob_of(weights).digest,
        score_before=before,
        score=score,
        at=time.time(),
    )


def _is_of(uses: Sequence[Use], use: Use, run_id: str, rounds: Collection[int]) -> bool:
    """Return True if the model came into use as the published one of these rounds, adapted or not.

    One that this device had itself trained before is not, nor one that another round has published as well.
    """
    same = [each for each in uses if each.digest == use.digest]
    published = [each for each in same if each.source in (Source.PUBLISHED, Source.ADAPTED)]
    is_of = all(each.run_id == run_id and each.round in rounds for each in published)
    return same[0] in published and is_of


def _is_same(one: Use, other: Use) -> bool:
    """Return True if both tell of the same step."""
    return (one.run_id, one.round, one.source, one.digest) == (
        other.run_id,
        other.round,
        other.source,
        other.digest,
    )
