"""The shell blocks of README, of the tutorial and of the page on back-ups do what they say, one by one."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.shell import NOT_RUN, Block, Reader, blocks_of
from tests.processes import ROOT, free_port
from tests.unit.test_data import write_mnist

README, TUTORIAL, UPGRADE = ROOT / "README.md", ROOT / "docs/tutorial.md", ROOT / "docs/upgrade.md"
# The first lines of blocks of README that are not run, and why.
README_NOT_RUN = {
    "make install": "it downloads packages; the tests run in what it has made",
    "python3 -m venv .venv": "it downloads packages; the tests run in such an environment",
    "make demo": "tests/integration/test_demo.py runs it",
}
# A page starts seven or more processes, most of which import PyTorch, one after the other.
at_its_pace = pytest.mark.timeout(400)
TOKEN = re.compile(r"ecavg1\.[\w-]+")


def blocks_to_run(page: Path) -> Iterator[Block]:
    for block in blocks_of(page.read_text("utf-8")):
        first = block.text.partition("\n")[0]
        if not block.not_run and not (page == README and first in README_NOT_RUN):
            yield block


@pytest.fixture
def ports() -> dict[str, str]:
    """Return ports of this machine that are free, by those of the pages, which may be taken."""
    return {"50051": str(free_port()), "8080": str(free_port())}


@pytest.fixture
def reader(tmp_path: Path, ports: dict[str, str]) -> Iterator[Reader]:
    folder, logs, data = (tmp_path / name for name in ("work", "logs", "data"))
    folder.mkdir()
    logs.mkdir()
    write_mnist(data)
    (folder / ".venv").symlink_to(sys.prefix)
    env = {
        "ECAVG_SERVER_PORT": ports["50051"],
        "ECAVG_SERVER_HTTP_PORT": ports["8080"],
        # A few images instead of MNIST, which would be downloaded.
        "ECAVG_AGENT_DATA_DIR": str(data),
        "OMP_NUM_THREADS": "1",
    }
    reader = Reader(folder, env, logs)
    yield reader
    reader.close()


def follow(page: Path, reader: Reader, ports: dict[str, str]) -> None:
    """Copy the blocks of a page, with free ports, and for `ecavg1.…` the token that the server printed."""
    for block in blocks_to_run(page):
        if block.waits:
            reader.wait()
        text = block.text
        for port, free in ports.items():
            text = text.replace(port, free)
        if "ecavg1.…" in text:
            text = text.replace("ecavg1.…", TOKEN.findall(reader.output)[0])
        reader.copy(text)
    reader.wait()


@at_its_pace
def test_readme_gets_three_terminals_through_a_round(reader: Reader, ports: dict[str, str]) -> None:
    follow(README, reader, ports)
    assert reader.output.count("enrolled as edge-") == 2
    assert reader.output.count(", applied") + reader.output.count("kept its own model") == 2


@at_its_pace
@pytest.mark.soak
def test_tutorial_gets_to_an_answer_and_a_back_up(reader: Reader, ports: dict[str, str]) -> None:
    pytest.importorskip("onnxruntime", reason="there is no ONNX Runtime: pip install 'ecavg[onnx]'")
    follow(TUTORIAL, reader, ports)
    output = reader.output
    assert "round 1  published" in output
    assert re.findall(r"the model says (\d), it is a \1", output) == list("01234")
    follow(UPGRADE, reader, ports)
    assert "restored/server: " in reader.output[len(output) :]


def test_what_is_not_run_of_readme_is_there() -> None:
    firsts = {block.text.partition("\n")[0] for block in blocks_of(README.read_text("utf-8"))}
    assert set(README_NOT_RUN) <= firsts


@pytest.mark.parametrize("page", [README, TUTORIAL, UPGRADE], ids=lambda page: page.name)
def test_every_shell_block_is_seen(page: Path) -> None:
    blocks = list(blocks_of(page.read_text("utf-8")))
    assert len(blocks) == page.read_text("utf-8").count("```sh\n")
    assert list(blocks_to_run(page))


def test_comment_before_a_block_must_mean_something() -> None:
    block = "```sh\ntrue\n```\n"
    assert [found.not_run for found in blocks_of(f"<!-- {NOT_RUN}no disk -->\n{block}")] == ["no disk"]
    with pytest.raises(ValueError, match="what is <!-- not runn -->"):
        list(blocks_of(f"<!-- not runn -->\n{block}"))


def test_block_that_fails_is_noticed(reader: Reader) -> None:
    with pytest.raises(AssertionError, match=r"exit code 1:\n.*nobody"):
        reader.copy("echo nobody\nfalse\ntrue\n")
