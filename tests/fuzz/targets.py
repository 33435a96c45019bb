"""What is fuzzed: each takes any bytes, and raises only what its callers count on.

Where a gate lets bytes pass, what comes behind it must be able to do with them what it does.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors
from pydantic import ValidationError
from safetensors.numpy import save

from ecavg.cloud_server.config import ServerConfig
from ecavg.common import layers, schema, shards, wire
from ecavg.common.config import ProcessConfig, RunConfig, Wire
from ecavg.common.dataset import pictures
from ecavg.common.errors import InvalidError, UsageError
from ecavg.common.schema import Header, TensorSpec
from ecavg.edge_agent.config import AgentConfig

IMAGE_SHAPE = (1, 2, 2)
NUM_CLASSES = 3
SPEC = pictures(NUM_CLASSES, IMAGE_SHAPE, (), ())
WEIGHTS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.float32([0.5]),
    "running_var": np.float32([1, 2]),
    "n": np.array(7),
}
SCHEMA: Mapping[str, TensorSpec] = {
    name: TensorSpec("I64" if name == "n" else "F32", values.shape) for name, values in WEIGHTS.items()
}
BASE = save(WEIGHTS)
BASE_DIGEST = "0" * 64  # the gate holds it against what the file says; nobody hashes the base


def check_header(content: bytes) -> None:
    """Check that a file which passes our check can also be read by the format's own library."""
    try:
        header = schema.parse_header(content, len(content))
    except InvalidError as error:
        _is_one_line(error)
        return
    found = {name: (info["dtype"], tuple(info["shape"])) for name, info in safetensors.deserialize(content)}
    assert found == {name: tuple(spec) for name, spec in header.schema.items()}


def check_shard(content: bytes) -> None:
    """Check that a shard which passes our check can be mapped, and has the checked images and labels."""
    with _file(content) as path:
        try:
            header = schema.read_header(path)
            num_examples = schema.check_shard(header, SPEC)
            schema.check_examples(path, header, SPEC)
        except InvalidError as error:
            _is_one_line(error)
            return
        shard = shards.read_shard(path)
        assert shard.inputs.shape == (num_examples, *IMAGE_SHAPE)
        assert shard.targets.shape == (num_examples,)
        assert 0 <= shard.targets.min() <= shard.targets.max() < NUM_CLASSES


def check_wire(content: bytes) -> None:
    """Check that weights which pass our check can be decoded to finite weights of the run's model."""
    with _file(content) as path:
        try:
            header = schema.read_header(path)
            _check_encoded(header)
            wire.check_values(path, header)
        except InvalidError as error:
            _is_one_line(error)
            return
        base, target = path.with_name("base"), path.with_name("decoded")
        base.write_bytes(BASE)
        wire.decode(path, target, base=wire.Base(base, BASE_DIGEST))
        schema.check_weights(schema.read_header(target), SCHEMA)


def check_config(content: bytes) -> None:
    """Check the content as a configuration file of server and agent, and as the run that an agent gets."""
    with _file(content) as path:
        loaders: tuple[tuple[type[ProcessConfig], dict[str, str]], ...] = (
            (ServerConfig, {}),
            (AgentConfig, {"server": "127.0.0.1:1"}),
        )
        for config_class, flags in loaders:
            try:
                layers.load(config_class, env_prefix="X_", config_file=str(path), flags=flags, environ={})
            except UsageError as error:
                _is_one_line(error)
    try:
        run = RunConfig.model_validate_json(content)
    except ValidationError:
        return
    assert RunConfig.model_validate_json(run.model_dump_json()) == run


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "header": check_header,
    "shard": check_shard,
    "wire": check_wire,
    "config": check_config,
}


def _check_encoded(header: Header) -> None:
    found: Wire = wire.encoding_of(header).wire
    wire.check_encoded(header, SCHEMA, found, base_digest=BASE_DIGEST if found == "int8" else None)


def _is_one_line(error: Exception) -> None:
    assert str(error).isprintable(), repr(str(error))
    assert len(str(error)) < 2000


@contextmanager
def _file(content: bytes) -> Iterator[Path]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        path = Path(folder) / "file"
        path.write_bytes(content)
        yield path
