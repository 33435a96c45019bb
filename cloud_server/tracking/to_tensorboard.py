"""TensorBoard: event files in DIR/RUN_ID, one event for each part of a round.

The files say themselves what has been written: they are read at the start. A record that was cut off by a
kill is the last one of its file, and does not count, for TensorBoard as little as here.
"""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.record_writer import RecordWriter

from ecavg.cloud_server.tracking.facts import Facts, RunFacts

# A record is its length in 8 bytes, a checksum of that in 4, the event, and a checksum of the event in 4.
_HEADER = struct.Struct("<QI")
_CHECKSUM_BYTES = 4


class TensorBoard:
    """The event files of a run below a folder of TensorBoard's."""

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # The file of this life of the server; it is open no longer than a write takes.
        self._path = folder
        # The tag and the step of everything that is in the files.
        self._written: set[tuple[str, int]] = set()

    def open(self, run: RunFacts) -> int:
        """Read what the files hold, begin another one, and return the last round that they have."""
        folder = self._folder / f"{run.name}-{run.run_id[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        files = sorted(folder.glob("events.out.tfevents.*"))
        self._written = {point for file in files for point in _points(file)}
        # The names are in the order of time, which is how TensorBoard reads them.
        self._path = folder / f"events.out.tfevents.{time.time_ns() // 1000:020d}.ecavg"
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if ("parameters", 0) not in self._written:
            rows = [f"| {key} | {value.replace('|', '¦')} |" for key, value in run.parameters.items()]
            table = "\n".join(["| key | value |", "| --- | --- |", *rows])
            self._add(0, time.time(), [_text("parameters", table)])
        return max((step for tag, step in self._written if tag != "parameters"), default=-1)

    def write(self, facts: Facts) -> None:
        """Append one event with the values that are not in the files."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in facts.metrics.items()]
        if facts.report is not None:
            report = json.dumps(facts.report, indent=2)
            values.append(_text("report", "\n".join(f"    {line}" for line in report.splitlines())))
        self._add(facts.round, facts.at, values)

    def finish(self) -> None:
        """Do nothing: event files have no end."""

    def _add(self, step: int, at: float, values: list[Summary.Value]) -> None:
        new = [value for value in values if (value.tag, step) not in self._written]
        if new:
            self._append(Event(wall_time=at, step=step, summary=Summary(value=new)))
            self._written |= {(value.tag, step) for value in new}

    def _append(self, event: Event) -> None:
        with self._path.open("ab") as file:
            RecordWriter(file).write(event.SerializeToString())


def _text(tag: str, markdown: str) -> Summary.Value:
    plugin = SummaryMetadata.PluginData(plugin_name="text")
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype=DT_STRING, string_val=[markdown.encode()], tensor_shape=shape)
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)


def _points(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the tag and the step of each value in an event file, up to a record that was cut off."""
    with path.open("rb") as file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            num_bytes = _HEADER.unpack(header)[0]
            record = file.read(num_bytes + _CHECKSUM_BYTES)
            if len(record) < num_bytes + _CHECKSUM_BYTES:
                return
            event = Event.FromString(record[:num_bytes])
            yield from ((value.tag, event.step) for value in event.summary.value)
