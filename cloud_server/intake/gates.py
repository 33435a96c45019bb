"""What a blob must pass before it is stored: a size, a header, a content."""

from collections.abc import Sequence
from pathlib import Path

from common import schema, wire
from common.config import DatasetSpec, Wire
from common.errors import InvalidError, Reason


class BlobGate:
    """What blobs of one kind must pass: a size, a header, a content."""

    def __init__(self, kind: str, max_bytes: int, max_tensors: int) -> None:
        self._kind = kind
        self.max_bytes = max_bytes
        self.max_tensors = max_tensors

    def check_size(self, size_bytes: int) -> None:
        if not 0 < size_bytes <= self.max_bytes:
            raise InvalidError(
                f"{self._kind} of {size_bytes} bytes; the server takes at most {self.max_bytes}",
                Reason.SIZE_LIMIT,
            )

    def check_header(self, header: schema.Header) -> None:
        raise NotImplementedError

    def check_content(self, path: Path) -> None:
        raise NotImplementedError


class WeightsGate(BlobGate):
    """Weights have the run's names, shapes and dtypes, are encoded as they should be, and finite.

    Differences may be from any base here, or what comes late would be refused: see `Uploads.check_base`.
    """

    def __init__(self, expected: schema.Schema, wires: Sequence[Wire]) -> None:
        encoded = [wire.wire_schema(expected, each).values() for each in wires]
        num_bytes = max(sum(tensor.num_bytes for tensor in tensors) for tensors in encoded)
        max_tensors = max(map(len, encoded))
        super().__init__("weights", schema.most_file_bytes(num_bytes), max_tensors)
        self._expected = expected
        self._wires = wires

    def check_header(self, header: schema.Header) -> None:
        found = wire.encoding_of(header)
        allowed = found.wire if found.wire in self._wires else self._wires[0]
        wire.check_encoded(header, self._expected, allowed, base_digest=found.base)

    def check_content(self, path: Path) -> None:
        wire.check_values(path, schema.read_header(path))


class DataGate(BlobGate):
    """A shard has the dataset's image shape and its labels."""

    def __init__(self, spec: DatasetSpec, max_bytes: int) -> None:
        super().__init__("data", max_bytes, max_tensors=2)
        self._spec = spec

    def check_header(self, header: schema.Header) -> None:
        schema.check_shard(header, image_shape=self._spec.image_shape)

    def check_content(self, path: Path) -> None:
        schema.check_labels(path, schema.read_header(path), self._spec.num_classes)
