"""The reference is complete, and no link of the documents is broken."""

import argparse
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import ecavg
from docs import calls, generate
from ecavg.cloud_server.commands import admin, status
from ecavg.cloud_server.commands import doctor as server_doctor
from ecavg.cloud_server.config import DEFAULT_PRESET, ServerConfig
from ecavg.cloud_server.metrics import ServerMetrics
from ecavg.cloud_server.store import Store
from ecavg.common.cli import add_flags
from ecavg.common.pb import ecavg_pb2 as pb
from ecavg.common.tasks import KINDS, published
from ecavg.edge_agent import doctor as agent_doctor
from ecavg.edge_agent.config import AgentConfig, EnrollConfig
from ecavg.edge_agent.metrics import AgentMetrics
from ecavg.edge_agent.model_commands import MODEL_COMMANDS
from ecavg.edge_agent.state import Report
from tests.unit.states import begin, contribute, publish
from tests.unit.test_reports import NAMES, RESULT, report_of

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MESSAGES = pb.DESCRIPTOR.message_types_by_name
MAX_README_LINES = 170
MAX_ARCHITECTURE_LINES = 200


def documents() -> list[Path]:
    """Return the Markdown files that git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for name in listed.splitlines() if (path := ROOT / name).exists()]


def code_in(page: str) -> set[str]:
    """Return what a page of the reference has in backticks, and each word of it."""
    spans = re.findall(r"`([^`\n]+)`", (DOCS / page).read_text("utf-8"))
    return set(spans) | {word for span in spans for word in re.findall(r"[\w-]+", span)}


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors_of(path: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a document."""
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_broken(document: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    path = (document.parent / name) if name else document
    if not path.exists():
        return True
    return bool(anchor) and anchor not in anchors_of(path)


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_relative_link_is_broken(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text("utf-8")))
    relative = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in relative if is_broken(document, link)] == []


@pytest.mark.parametrize("broken", ["nowhere.md", "#no-such-heading", "docs/README.md#no-such-heading"])
def test_broken_link_is_noticed(broken: str) -> None:
    assert is_broken(ROOT / "README.md", broken)


@pytest.mark.parametrize(
    ("name", "lines"), [("README.md", MAX_README_LINES), ("ARCHITECTURE.md", MAX_ARCHITECTURE_LINES)]
)
def test_first_documents_are_short(name: str, lines: int) -> None:
    assert len((ROOT / name).read_text("utf-8").splitlines()) <= lines


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text("utf-8")
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - {"README.md"}
    assert pages == {page for page in pages if f"({page})" in index}


def test_configuration_page_is_what_the_generator_writes() -> None:
    text = generate.PAGE.read_text("utf-8")
    assert generate.page(text) == text, "run `make docs`"


def test_page_of_calls_is_what_the_generator_writes() -> None:
    assert calls.PAGE.read_text("utf-8") == calls.page(), "run `make docs`"


def test_page_of_calls_has_every_call_message_field_and_value() -> None:
    code = code_in("calls.md")
    assert all(field.name in code for message in MESSAGES.values() for field in message.fields)
    assert all(set(enum.values_by_name) <= code for enum in pb.DESCRIPTOR.enum_types_by_name.values())
    headings = anchors_of(calls.PAGE)
    methods = pb.DESCRIPTOR.services_by_name["ECAvg"].methods_by_name
    assert {*map(str.lower, MESSAGES), *(f"call-{name.lower()}" for name in methods)} <= headings


@pytest.mark.parametrize("name", generate.TABLES)
def test_every_key_is_described_and_in_the_reference(name: str) -> None:
    keys, _, _ = generate.TABLES[name]
    tables = "".join(generate.table(each) for each in generate.TABLES)
    for key, field in keys.model_fields.items():
        if not isinstance(field.default, BaseModel):
            assert field.description, f"{key} has no docstring"
            assert f"`{key}`" in tables


@pytest.mark.parametrize("config_class", [ServerConfig, AgentConfig, EnrollConfig])
def test_every_flag_is_in_the_reference(config_class: type[Any]) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser, config_class, DEFAULT_PRESET)
    assert flags_of(parser) <= code_in("configuration.md")


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}


def subcommands_of(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, set[str]]]:
    """Yield the name and the flags of each command below a parser."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield name, flags_of(parser)
    for action in below:
        for word, child in action.choices.items():
            yield from subcommands_of(child, f"{name} {word}")


def test_every_subcommand_is_in_the_reference() -> None:
    code = code_in("commands.md")
    commands = dict(subcommands_of(admin._parser(), "cloud-server"))
    assert len(commands) == 6
    for command, flags in commands.items():
        assert any(span.startswith(command) for span in code), command
        assert flags <= code
    assert flags_of(status._parser()) <= code
    assert {"cloud-server check STATE", "cloud-server status", "cloud-server doctor", "cloud-server"} <= code
    assert {"edge-agent enroll", "edge-agent doctor", "edge-agent"} <= code
    for name in MODEL_COMMANDS:
        assert any(span.split()[:2] == ["edge-agent", name] for span in code), name


@pytest.mark.parametrize("checks", [server_doctor.checks, agent_doctor.checks])
def test_every_check_of_a_doctor_is_in_the_reference(checks: Callable[[Any], dict[str, Any]]) -> None:
    config = AgentConfig(server="localhost:1") if checks is agent_doctor.checks else ServerConfig()
    assert set(checks(config)) <= code_in("commands.md")


@pytest.mark.parametrize("metrics", [ServerMetrics, AgentMetrics])
def test_every_metric_is_in_the_reference(metrics: type[Any]) -> None:
    families = [family for family in metrics().registry.collect() if is_ours(family.name)]
    names = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert len(names) >= 5
    assert names <= code_in("metrics.md")


def is_ours(name: str) -> bool:
    return name.startswith(("ecavg_", "grpc_"))


def test_every_call_is_in_the_reference() -> None:
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["ECAvg"].methods}
    assert methods <= code_in("protocol.md")


def fields_of(value: object) -> set[str]:
    """Return the names of all fields in a report, those of its tables and lists included."""
    if isinstance(value, dict):
        return set(value) | {name for below in value.values() for name in fields_of(below)}
    if isinstance(value, list):
        return {name for below in value for name in fields_of(below)}
    return set()


async def test_every_field_of_a_report_is_in_the_reference(tmp_path: Path) -> None:
    with closing(Store(tmp_path)) as store:
        begin(store, tmp_path)
        contribute(store, 1)
        publish(store, tmp_path, 1)
        report = await report_of(RESULT, store, tmp_path, class_names=NAMES)
    fields = fields_of(json.loads(json.dumps(report)))
    assert {"accuracy_published", "norm_ratio", "num_examples"} <= fields
    written = code_in("reports.md") | code_in("models.md")
    assert fields | {"failure", "left_out", "applied", "accuracy_adapted"} <= written


def test_every_field_of_an_agents_report_is_in_the_reference() -> None:
    fields = published(KINDS["classification"], dict.fromkeys(Report.model_fields))
    assert {"agent_id", *fields} <= code_in("reports.md")


def test_all_that_the_library_gives_is_in_its_page() -> None:
    code = code_in("library.md")
    assert {*ecavg.__all__, *ecavg.Start._fields, "inputs", "targets", "normalise"} <= code
