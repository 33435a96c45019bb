"""The generator of docs/calls.md: what the comments of ecavg.proto say of each call, message and field."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).parent / "calls.md"
PROTO = "common/pb/ecavg.proto"

# Where something is in a .proto, as protoc writes it: the numbers of fields and indices, from the file on.
Place = tuple[int, ...]


class Contract:
    """A .proto file with its comments."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._file = file
        self._locations = {tuple(each.path): each for each in file.source_code_info.location}

    def page(self) -> str:
        """Return the Markdown page."""
        number = {field.name: field.number for field in FileDescriptorProto.DESCRIPTOR.fields}
        parts = [
            "# Calls and messages",
            "<!-- `make docs` writes this page from proto/common/pb/ecavg.proto. -->",
            "This page has what [ecavg.proto](../proto/common/pb/ecavg.proto) says of every call, message and"
            " value;\n[protocol](protocol.md) has the overview.",
            self._preface(number["syntax"]),
        ]
        for index, service in enumerate(self._file.service):
            parts += self._calls(service, (number["service"], index))
        parts.append("## Messages")
        for index, message in enumerate(self._file.message_type):
            parts += self._message(message, (number["message_type"], index))
        parts.append("## Values")
        for index, enum in enumerate(self._file.enum_type):
            parts += self._enum(enum, (number["enum_type"], index))
        return "\n\n".join(filter(None, parts)) + "\n"

    def _preface(self, syntax: int) -> str:
        """Return the paragraphs at the top of the file, without the first, which says what the file is."""
        paragraphs = self._locations[(syntax,)].leading_comments.strip().split("\n\n")
        return "\n\n".join("\n".join(line.strip() for line in each.splitlines()) for each in paragraphs[1:])

    def _comment(self, place: Place) -> str:
        """Return the comment before or behind something, in one line.

        Raises:
            ValueError: there are two, so the first may be the rest of another one's comment.
        """
        location = self._locations[place]
        if location.leading_comments and location.trailing_comments:
            raise ValueError(f"{PROTO}:{location.span[0] + 1}: write one comment, in one line")
        text = " ".join((location.leading_comments or location.trailing_comments).split())
        return text.replace("|", "\\|")

    def _calls(self, service: ServiceDescriptorProto, place: Place) -> Iterator[str]:
        yield f"## Calls of `{self._file.package}.{service.name}`"
        number = ServiceDescriptorProto.METHOD_FIELD_NUMBER
        for index, method in enumerate(service.method):
            yield f"### Call {method.name}"
            yield f"{_signature(method)}. {self._comment((*place, number, index))}"

    def _message(self, message: DescriptorProto, place: Place) -> Iterator[str]:
        yield f"### {message.name}"
        yield self._comment(place)
        if message.field:
            rows = ["| field | type | meaning |", "| --- | --- | --- |"]
            for index, field in enumerate(message.field):
                meaning = self._comment((*place, DescriptorProto.FIELD_FIELD_NUMBER, index))
                rows.append(f"| `{field.name}` = {field.number} | {_type(field)} | {meaning} |")
            yield "\n".join(rows)
        else:
            yield "It has no fields."

    def _enum(self, enum: EnumDescriptorProto, place: Place) -> Iterator[str]:
        yield f"### {enum.name}"
        yield self._comment(place)
        rows = ["| value | meaning |", "| --- | --- |"]
        for index, value in enumerate(enum.value):
            meaning = self._comment((*place, EnumDescriptorProto.VALUE_FIELD_NUMBER, index))
            rows.append(f"| `{value.name}` = {value.number} | {meaning or 'not set'} |")
        yield "\n".join(rows)


def _signature(method: MethodDescriptorProto) -> str:
    """Return what a call takes and returns, with links to both."""
    taken = ("stream of " if method.client_streaming else "") + _link(method.input_type)
    returned = ("stream of " if method.server_streaming else "") + _link(method.output_type)
    return f"{taken} → {returned}"


def _link(type_name: str) -> str:
    name = type_name.rpartition(".")[2]
    return f"[{name}](#{name.lower()})"


def _type(field: FieldDescriptorProto) -> str:
    kinds = FieldDescriptorProto.Type
    name = _link(field.type_name) if field.type_name else kinds.Name(field.type).removeprefix("TYPE_").lower()
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"list of {name}"
    if field.proto3_optional:
        return f"optional {name}"
    return f"{name}, one of" if field.HasField("oneof_index") else name


def read_contract() -> Contract:
    """Return what protoc reads from the .proto of this repository."""
    # Imported here, because the other pages are generated without it.
    from grpc_tools import protoc

    with tempfile.NamedTemporaryFile() as out:
        arguments = [f"-I{ROOT / 'proto'}", "--include_source_info", f"--descriptor_set_out={out.name}"]
        if protoc.main(["protoc", *arguments, PROTO]):
            raise ValueError(f"{PROTO} cannot be read: see above")
        described = FileDescriptorSet.FromString(Path(out.name).read_bytes())
    return Contract(described.file[0])


def page() -> str:
    """Return the text of docs/calls.md."""
    return read_contract().page()
