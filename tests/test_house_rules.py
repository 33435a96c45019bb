"""The rules of the house, checked: who may import whom, and that tables and generated code are complete."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2

from ecavg.common import errors, rpc
from ecavg.common.pb import ecavg_pb2 as pb
from tests.rooms import BEGIN, END, ROOMS, drawing

ROOT = Path(__file__).parent.parent
PACKAGES = ("common", "edge_agent", "cloud_server", "ecavg")
TORCH = {"torch", "torchvision"}
MAY_IMPORT_TORCH = {
    "common/batches.py",
    "common/checkpoint.py",
    "common/devices.py",
    "common/evaluation.py",
    "common/graphs.py",
    "common/mapped.py",
    "common/models.py",
    "common/rehearsal.py",
    "common/precision.py",
    "common/ranks.py",
    "common/sharding.py",
    "common/tasks/classification.py",
    "common/tasks/multi_label.py",
    "common/tasks/regression.py",
    "common/tasks/segmentation.py",
    "common/tasks/task.py",
    "common/training.py",
    "common/training_step.py",
    "common/weights.py",
    "common/windows.py",
    "edge_agent/downloads.py",
    "edge_agent/exporting.py",
    "edge_agent/local.py",
    "edge_agent/own_training.py",
    "edge_agent/prediction.py",
    "edge_agent/splits.py",
}
MAY_IMPORT_GRPC = {
    "cloud_server/__main__.py",
    "cloud_server/server.py",
    "common/rpc.py",
    "edge_agent/__main__.py",
    "edge_agent/client.py",
}
SLOW_TO_IMPORT = {"torch", "numpy", "grpc", "cryptography", "structlog", "pydantic_settings"}
MAY_IMPORT_CRYPTOGRAPHY = {"common/tls.py"}
MAY_IMPORT_PB = {
    "cloud_server/servicer.py",
    "common/transfer.py",
    "edge_agent/client.py",
    "edge_agent/replies.py",
}
FORBIDDEN = {
    "pickle", "_pickle", "pickletools", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal",
    "jsonpickle", "copyreg", "yaml",
}  # fmt: skip
# What unpickles, or runs text that it is given; `yaml.load` and its like go with the module.
UNPICKLING = {
    "torch.load", "torch.serialization.load", "torch.jit.load", "torch.export.load", "torch.hub.load",
    "torch.package.PackageImporter", "numpy.load", "numpy.fromfile", "pandas.read_pickle",
    "multiprocessing.connection.Client", "multiprocessing.connection.Listener", "logging.config.listen",
    "eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "os.system", "os.popen",
}  # fmt: skip


def own_modules() -> list[str]:
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return sorted(str(path.relative_to(ROOT)) for path in files if not path.match("common/pb/*"))


def tree_of(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text("utf-8"), module)


def imports_of(module: str) -> Iterator[str]:
    """Dotted names, wherever in the file they are imported; for `from a import b` both a and a.b."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_levels(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports_of(module)}


@pytest.mark.parametrize("module", own_modules())
def test_imports_keep_to_the_arrows(module: str) -> None:
    package = module.split("/")[0]
    others = {
        "common": {"edge_agent", "cloud_server", "agent"},
        "edge_agent": {"cloud_server", "agent"},
        "cloud_server": {"edge_agent", "agent"},
        "ecavg": {"cloud_server"},
    }
    parts = {tuple(name.split(".")) for name in imports_of(module)}
    assert not {name[1] for name in parts if name[0] == "ecavg" and len(name) > 1} & others[package]
    # The folders at the top are packages only in this folder: see docs/internals/decisions.md.
    assert not top_levels(module) & {"common", "edge_agent", "cloud_server"}
    assert package == "ecavg" or "ecavg" not in imports_of(module)
    assert not top_levels(module) & FORBIDDEN
    if not module.startswith("cloud_server/trainer/") and module not in MAY_IMPORT_TORCH:
        assert not top_levels(module) & TORCH
    if module not in MAY_IMPORT_GRPC:
        assert not {name for name in top_levels(module) if name.startswith("grpc")}
    if module not in MAY_IMPORT_CRYPTOGRAPHY:
        assert "cryptography" not in top_levels(module)
    if module not in MAY_IMPORT_PB:
        assert not {name for name in imports_of(module) if name.startswith("ecavg.common.pb")}


def test_torchvision_is_imported_only_inside_functions_that_need_it() -> None:
    # Its import takes as long as that of PyTorch, and many models do without.
    at_once = [
        module
        for module in own_modules()
        for node in tree_of(module).body
        if "torchvision" in ast.unparse(node) and isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert at_once == []


def rooms_that(module: str) -> set[str]:
    """Return the rooms of the server, other than its own, that a module of the server imports."""
    names = {name.split(".")[2] for name in imports_of(module) if name.startswith("ecavg.cloud_server.")}
    return names - {room_of(module)}


def room_of(module: str) -> str:
    return module.split("/")[1].removesuffix(".py")


@pytest.mark.parametrize("module", [name for name in own_modules() if name.startswith("cloud_server/")])
def test_rooms_lean_on_those_that_they_may(module: str) -> None:
    if module != "cloud_server/__init__.py":
        allowed = {room.name: set(room.leans_on) for room in ROOMS}[room_of(module)]
        assert rooms_that(module) <= allowed


def test_every_arrow_between_rooms_is_used_and_goes_down() -> None:
    used: dict[str, set[str]] = {room.name: set() for room in ROOMS}
    for module in own_modules():
        if module.startswith("cloud_server/") and module != "cloud_server/__init__.py":
            used[room_of(module)] |= rooms_that(module)
    assert used == {room.name: set(room.leans_on) for room in ROOMS}
    order = [room.name for room in ROOMS]
    for room in ROOMS:
        assert {order.index(name) for name in room.leans_on} <= set(
            range(order.index(room.name) + 1, len(order))
        )


def test_round_store_and_jobs_do_not_know_each_other() -> None:
    kept_apart = {"round", "store", "jobs"}
    for room in ROOMS:
        if room.name in kept_apart:
            assert not kept_apart & set(room.leans_on)


def test_rooms_in_the_architecture_are_those_of_the_rules() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    drawn = text.partition(BEGIN)[2].partition(END)[0]
    assert drawn.strip() == drawing(), "put what `python -m tests.rooms` prints between the markers"


def calls_of(module: str) -> Iterator[str]:
    """Dotted names of what is called, aliases resolved: "torch.load", also for `import torch as t`."""
    aliases = {}
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Call):
            first, _, rest = ast.unparse(node.func).partition(".")
            yield ".".join(filter(None, (aliases.get(first, first), rest)))


@pytest.mark.parametrize("module", own_modules())
def test_nothing_unpickles(module: str) -> None:
    assert not set(imports_of(module)) & UNPICKLING
    assert not set(calls_of(module)) & UNPICKLING
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle"


def test_serving_process_does_not_import_torch() -> None:
    code = (
        "import sys, ecavg.cloud_server.server, ecavg.cloud_server.coordinator,"
        " ecavg.cloud_server.training.supervisor, ecavg.common.run_display,"
        " ecavg.cloud_server.commands.admin, ecavg.cloud_server.__main__;"
        "sys.exit(1 if 'torch' in sys.modules else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("package", ["cloud_server", "edge_agent"])
def test_help_imports_nothing_that_takes_long(package: str) -> None:
    code = (
        f"import sys, ecavg.{package}.__main__ as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit: pass\n"
        f"sys.exit(1 if {SLOW_TO_IMPORT} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True)
    assert done.returncode == 0


def test_nobody_loads_fsdp2_who_shards_no_model() -> None:
    code = (
        "import sys, ecavg.edge_agent.local, ecavg.cloud_server.trainer.work;"
        "sys.exit(1 if {'torch.distributed.fsdp', 'torch.distributed.tensor'} & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_commands_about_tokens_and_agents_need_no_grpc() -> None:
    code = (
        "import sys, ecavg.cloud_server.commands.admin;"
        "sys.exit(1 if {'torch', 'grpc'} & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("document", ["SECURITY.md", "docs/survives.md"])
def test_promises_name_tests(document: str) -> None:
    assert re.search(r"`test_\w+`", (ROOT / document).read_text("utf-8"))


@pytest.mark.parametrize(
    "document",
    ["README.md", "SECURITY.md", *(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))],
)
def test_every_test_that_a_promise_names_exists(document: str) -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / document).read_text("utf-8")))
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert named <= set(re.findall(r"def (test_\w+)", sources))


def refusals(error: type[errors.Refusal] = errors.Refusal) -> Iterator[type[errors.Refusal]]:
    yield error
    for child in error.__subclasses__():
        yield from refusals(child)


def test_every_refusal_has_one_status_and_status_and_reason_have_one_refusal() -> None:
    assert set(rpc.STATUS) == set(refusals())
    for error, status in rpc.STATUS.items():
        trailing = grpc.aio.Metadata((rpc.REASON_KEY, error.default_reason.value))
        sent = grpc.aio.AioRpcError(status, grpc.aio.Metadata(), trailing, details="no")  # type: ignore[call-arg]
        assert type(rpc.error_from(sent)) is error


def test_reasons_are_those_of_the_wire() -> None:
    ours = {f"REASON_{reason.name}" for reason in errors.Reason}
    assert ours | {"REASON_UNSPECIFIED"} == set(pb.Reason.keys())


def test_generated_code_is_current(tmp_path: Path) -> None:
    out = tmp_path / "descriptors"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Iecavg=proto", f"--descriptor_set_out={out}"]
    subprocess.run([*command, "ecavg/common/pb/ecavg.proto"], cwd=ROOT, check=True)
    described = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file[0]
    committed = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(committed)
    for file in (described, committed):  # protoc alone fills these in
        for message in file.message_type:
            for field in message.field:
                field.ClearField("json_name")
    assert described == committed, "run `make proto`"


def test_every_field_and_value_of_the_wire_is_documented() -> None:
    lines = (ROOT / "proto/common/pb/ecavg.proto").read_text("utf-8").splitlines()
    declared = [line for line in lines if line.startswith("  ") and " = " in line]
    assert len(declared) > 80
    assert not [line for line in declared if "//" not in line and "UNSPECIFIED" not in line]
