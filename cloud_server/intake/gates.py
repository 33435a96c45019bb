"""What a blob must pass before it is stored: a size, a header, a content."""

from collections.abc import Sequence
from pathlib import Path

from ecavg.common import late_targets, schema, wire
from ecavg.common.config import Wire
from ecavg.common.dataset import DatasetSpec
from ecavg.common.errors import InvalidError, Reason


class BlobGate:
    """The checks that every blob of one kind must pass."""

    def __init__(self, kind: str, max_bytes: int, max_tensors: int) -> None:
        self._kind = kind
        self.max_bytes = max_bytes
        self.max_tensors = max_tensors

    def check_size(self, size_bytes: int) -> None:
        """Raise InvalidError unless a blob may have so many bytes."""
        if not 0 < size_bytes <= self.max_bytes:
            raise InvalidError(
                f"{self._kind} of {size_bytes} bytes; the server takes at most {self.max_bytes}",
                Reason.SIZE_LIMIT,
            )

    def check_header(self, header: schema.Header) -> None:
        """Raise InvalidError unless names, shapes and dtypes are as they should be."""
        raise NotImplementedError

    def check_content(self, path: Path) -> None:
        """Raise InvalidError unless the values of a whole file are as they should be."""
        raise NotImplementedError


class WeightsGate(BlobGate):
    """The gate for weights: the run's names, shapes and dtypes, an allowed encoding, finite values.

    Any base of differences passes, because weights for an earlier round come late, not unfit; whether the
    base is the right one is checked when the weights are contributed (`Uploads.check_base`).
    """

    def __init__(self, expected: schema.Schema, wires: Sequence[Wire]) -> None:
        encoded = [wire.wire_schema(expected, each).values() for each in wires]
        num_bytes = max(sum(tensor.num_bytes for tensor in tensors) for tensors in encoded)
        max_tensors = max(map(len, encoded))
        super().__init__("weights", schema.most_file_bytes(num_bytes), max_tensors)
        self._expected = expected
        self._wires = wires

    def check_header(self, header: schema.Header) -> None:
        """Raise InvalidError unless names, shapes and dtypes are as they should be."""
        found = wire.encoding_of(header)
        allowed = found.wire if found.wire in self._wires else self._wires[0]
        wire.check_encoded(header, self._expected, allowed, base_digest=found.base)

    def check_content(self, path: Path) -> None:
        """Raise InvalidError unless every value is finite."""
        wire.check_values(path, schema.read_header(path))


class DataGate(BlobGate):
    """The gate for shards and late targets: the dtypes, shapes and values of the run's dataset."""

    def __init__(self, spec: DatasetSpec, max_bytes: int) -> None:
        super().__init__("data", max_bytes, max_tensors=2)
        self._spec = spec

    def check_header(self, header: schema.Header) -> None:
        """Raise InvalidError unless names, shapes and dtypes are as they should be."""
        if late_targets.is_late(header):
            late_targets.check_late_header(header, self._spec)
        else:
            schema.check_shard(header, self._spec)

    def check_content(self, path: Path) -> None:
        """Raise InvalidError unless every value is finite and in range."""
        header = schema.read_header(path)
        check = late_targets.check_late_content if late_targets.is_late(header) else schema.check_examples
        check(path, header, self._spec)
