"""The generator of the reference: `python -m docs.generate` writes its pages and tables from the code.

The tables of docs/configuration.md are made here, and docs/calls.md in calls.py.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs import calls
from ecavg.cloud_server.config import ENV_PREFIX as SERVER_PREFIX
from ecavg.cloud_server.config import ServerConfig, TrackingConfig
from ecavg.common.config import FineTuneConfig, InputsConfig, RunConfig, TargetsConfig, TrainingConfig
from ecavg.edge_agent.config import ENV_PREFIX as AGENT_PREFIX
from ecavg.edge_agent.config import AgentConfig, EnrollConfig

PAGE = Path(__file__).parent / "configuration.md"

# Name of a table on the page → its class of keys, the prefix of its environment variables, its place.
TABLES: dict[str, tuple[type[BaseModel], str, str]] = {
    "server": (ServerConfig, SERVER_PREFIX, ""),
    "tracking": (TrackingConfig, SERVER_PREFIX, "tracking."),
    "run": (RunConfig, SERVER_PREFIX, "run."),
    "inputs": (InputsConfig, SERVER_PREFIX, "run.inputs."),
    "targets": (TargetsConfig, SERVER_PREFIX, "run.targets."),
    "pretrain": (TrainingConfig, SERVER_PREFIX, "run.pretrain."),
    "fine_tune": (FineTuneConfig, SERVER_PREFIX, "run.fine_tune."),
    "agent": (AgentConfig, AGENT_PREFIX, ""),
    "enroll": (EnrollConfig, AGENT_PREFIX, ""),
}
# The table that holds the keys which a table has from its base class.
INHERITED: dict[str, type[BaseModel]] = {"fine_tune": TrainingConfig, "enroll": AgentConfig}

_BOUNDS = {Ge: "≥ {.ge}", Gt: "> {.gt}", Le: "≤ {.le}", Lt: "< {.lt}"}
_IN_WORDS = re.compile(r"\s*\(default: (.*)\)\.?$", re.DOTALL)


def page(text: str) -> str:
    """Return the page's text with the content between each pair of markers made anew."""
    for name in TABLES:
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{table(name)}\n{end}{rest.partition(end)[2]}"
    return text


def table(name: str) -> str:
    """Return the Markdown table of one class of keys."""
    keys, prefix, place = TABLES[name]
    inherited = INHERITED[name].model_fields if name in INHERITED else {}
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, field in keys.model_fields.items():
        if key not in inherited and not isinstance(field.default, BaseModel):
            meaning, default = _meaning_and_default(field)
            names = f"`{key}`<br>{_reached_by(key, prefix, place)}"
            lines.append(f"| {names} | {_type(field)} | {default} | {meaning} |")
    return "\n".join(lines)


def _reached_by(key: str, prefix: str, place: str) -> str:
    variable = f"`{prefix}{(place + key).replace('.', '__').upper()}`"
    if place:
        return f"`--set {place}{key}=…`<br>{variable}"
    return f"`--{key.replace('_', '-')}`<br>{variable}"


def _meaning_and_default(field: FieldInfo) -> tuple[str, str]:
    paragraphs = (field.description or "").split("\n\n")
    in_words = _IN_WORDS.search(paragraphs[0])
    if in_words:
        paragraphs[0] = paragraphs[0][: in_words.start()] + "."
    # The last sentence of a paragraph has no full stop where a help text ends with it.
    ended = [each if each.rstrip().endswith((".", ":")) else f"{each.rstrip()}." for each in paragraphs]
    meaning = " ".join(" ".join(ended).split()).replace("|", "\\|")
    if in_words:
        return meaning, " ".join(in_words[1].split())
    return meaning, _default(field)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None:
        return "none"
    value = str(field.default) if isinstance(field.default, Path) else field.default
    return f"`{json.dumps(value)}`"


def _type(field: FieldInfo) -> str:
    bounds = [_BOUNDS[type(item)].format(item) for item in _constraints(field) if type(item) in _BOUNDS]
    return " ".join([_type_name(field.annotation), *bounds]).replace("|", "\\|")


def _constraints(field: FieldInfo) -> Iterator[Any]:
    yield from field.metadata
    for part in get_args(field.annotation):
        if get_origin(part) is Annotated:
            for item in part.__metadata__:
                yield from item.metadata if isinstance(item, FieldInfo) else (item,)


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in get_args(annotation))
    parts = [part for part in get_args(annotation) if part not in (type(None), Ellipsis)]
    if get_origin(annotation) is tuple:
        return f"list of {_type_name(parts[0])}"
    if parts:
        return " or ".join(map(_type_name, parts))
    names = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "path"}
    return names[annotation]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
    calls.PAGE.write_text(calls.page(), "utf-8")
