"""The memory and the time that a model of several gigabytes takes in a round of a cloud that only averages.

    python -m benchmarks.big_model --layers 22 --wire int8

The weights are random numbers under the names and shapes of a language model (Llama's; the defaults are those
of TinyLlama, 1.1 billion parameters), in several files with an index. A cloud-server and its trainer are
processes of their own. The agents are CloudClients of this process. Each changes one number of the weights,
encodes them as the run's `wire` says, uploads and contributes them, and downloads the published model. Nobody
trains, and nobody builds a model.
"""

import argparse
import asyncio
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import figures
from benchmarks.processes import Processes, children, peak_bytes, processes_in
from benchmarks.product import Server, enrolled, start_server
from benchmarks.transfer import changed
from ecavg.common.config import Wire
from ecavg.common.run_state import PublishedModel, RunState
from ecavg.common.schema import TensorSpec
from ecavg.common.sharded import write_sharded
from ecavg.common.tensor_files import PLAIN, writing
from ecavg.common.transfer import Blob, blob_of
from ecavg.common.wire import Base, decode, encode
from ecavg.edge_agent.client import CloudClient
from ecavg.edge_agent.metrics import AgentMetrics

AGENTS = ("agent-1", "agent-2")
# The initial weights are in files of so many bytes at most, as Hugging Face's tools write them.
SHARD_BYTES = 2 * 10**9
PIECE = 1 << 20


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    machine = figures.machine()
    schema = llama_schema(arguments.layers, arguments.hidden, arguments.vocabulary)
    temporary = tempfile.TemporaryDirectory(prefix="big-model-", dir=arguments.folder)
    with temporary as name, processes_in(Path(name)) as processes:
        measured = asyncio.run(_measure(processes, Path(name), schema, arguments))
    sizes = {
        "parameters": sum(math.prod(spec.shape) for spec in schema.values()),
        "tensors": len(schema),
        "model_bytes": sum(spec.num_bytes for spec in schema.values()),
        "largest_tensor_bytes": max(spec.num_bytes for spec in schema.values()),
    }
    result = {"benchmark": "big_model", "wire": arguments.wire, **sizes, **measured, "machine": machine}
    rows = [
        *((f"{process}, peak", f"{mib:.0f} MiB") for process, mib in measured["peak_mib"].items()),
        *((step, f"{seconds:.1f} s") for step, seconds in measured["seconds"].items()),
    ]
    title = f"{sizes['parameters'] / 1e9:.2f} billion parameters, {arguments.wire}"
    figures.emit(result, title, ("", ""), rows)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = figures.argument_parser(__doc__)
    parser.add_argument("--layers", type=int, default=22, metavar="N", help="layers of the model")
    parser.add_argument("--hidden", type=int, default=2048, metavar="N", help="width of the model")
    parser.add_argument("--vocabulary", type=int, default=32_000, metavar="N", help="tokens of the model")
    parser.add_argument("--wire", choices=("float32", "bfloat16", "int8"), default="float32")
    parser.add_argument("--folder", type=Path, help="on a disk with room for eight times the model")
    return parser.parse_args(argv)


def llama_schema(num_layers: int, hidden: int, vocabulary: int) -> dict[str, TensorSpec]:
    """Return the names and shapes of a Llama with grouped queries, as transformers names them."""
    inner, key = hidden * 11 // 4, hidden // 8
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(num_layers):
        parts: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (key, hidden),
            "self_attn.v_proj": (key, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    return {name: TensorSpec("F32", shape) for name, shape in shapes.items()}


def write_random(path: Path, schema: dict[str, TensorSpec]) -> None:
    """Write random weights of this schema, which must be float32, in pieces."""
    chance = np.random.default_rng(0)
    with writing(path, schema, PLAIN) as file:
        for name, spec in schema.items():
            num_elements = math.prod(spec.shape)
            for begin in range(0, num_elements, PIECE):
                values = chance.standard_normal(min(PIECE, num_elements - begin), np.float32)
                file.write(name, begin, values / 50)


def _write_initial(folder: Path, index: Path, schema: dict[str, TensorSpec]) -> int:
    """Write random weights in several files with an index, and return the number of files."""
    source = folder / "source.safetensors"
    write_random(source, schema)
    write_sharded(source, index, SHARD_BYTES)
    source.unlink()
    return len(list(folder.glob("model-*-of-*.safetensors")))


async def _measure(
    processes: Processes, folder: Path, schema: dict[str, TensorSpec], arguments: argparse.Namespace
) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    index = folder / "model.safetensors.index.json"
    num_files = await asyncio.to_thread(_write_initial, folder, index, schema)
    with _timed(seconds, "start"):
        # With one round the server would end while the model is downloaded, because nobody watches then.
        flags = ("--rounds", 2)
        run = _run(index, arguments.wire)
        server = await asyncio.to_thread(start_server, processes, folder, run, *flags)
    (trainer,) = children(server.pid)
    idle = _peaks(server.pid, trainer)
    clients = [await _connected(server, folder, name) for name in AGENTS]
    state = await _state(clients[0])
    base = folder / "initial"
    with _timed(seconds, "download_initial"):
        await clients[0].download(state.initial_weights, base, lambda *_: None)
    own, sent = folder / "own", folder / "sent"
    # Without a base of differences, nobody needs the initial weights any more.
    prepare = shutil.move if arguments.wire == "float32" else shutil.copyfile
    await asyncio.to_thread(prepare, base, own)
    blobs = [await _contribute(client, state, base, own, sent, arguments.wire, seconds) for client in clients]
    await asyncio.to_thread(own.unlink)
    with _timed(seconds, "average"):
        published = await _published(clients[0])
    fetched = folder / "fetched"
    with _timed(seconds, "download_published"):
        blob = published.encoded.blob if published.encoded else published.weights
        await clients[0].download(blob, fetched, lambda *_: None)
    peaks = _peaks(server.pid, trainer)
    if published.encoded:
        decode(fetched, own, base=Base(base, state.initial_weights.digest))
        fetched = own
    if blob_of(fetched) != published.weights:
        raise RuntimeError("what was downloaded is not the published model")
    for client in clients:
        await client.close()
    return {
        "files": num_files,
        "sent_bytes": blobs[0].size_bytes,
        "idle_mib": idle,
        "peak_mib": peaks,
        "seconds": seconds,
    }


def _run(index: Path, wire: str) -> str:
    return (
        f'model = "llama"\ndataset = "made-up"\nnum_classes = 2\nimage_shape = [1, 1, 1]\nwire = "{wire}"\n'
        f'initial_weights = "{index}"\ncandidates = ["average"]\n[run.fine_tune]\nepochs = 0\n'
    )


async def _connected(server: Server, folder: Path, name: str) -> CloudClient:
    client = CloudClient(server.address, await enrolled(server, folder / name, name), AgentMetrics())
    await client.join()
    return client


async def _state(client: CloudClient) -> RunState:
    async with aclosing(client.watch()) as states:  # type: ignore[type-var]
        return await anext(states)


async def _published(client: CloudClient) -> PublishedModel:
    """Return the model of the first round, when it is there."""
    async with aclosing(client.watch()) as states:  # type: ignore[type-var]
        async for state in states:
            if state.failure:
                raise RuntimeError(f"the round failed: {state.failure}")
            if state.latest_model:
                return state.latest_model
    raise RuntimeError("the server is gone")


async def _contribute(
    client: CloudClient,
    state: RunState,
    base: Path,
    own: Path,
    sent: Path,
    wire: Wire,
    seconds: dict[str, float],
) -> Blob:
    """Change the weights in one number, encode, upload and contribute them, and return what was sent.

    Args:
        own: the file of the weights that are changed.
        sent: the file that is written of the encoded weights.
    """
    initial, blob = state.initial_weights.digest, changed(own)
    if wire != "float32":
        with _timed(seconds, "encode"):
            await asyncio.to_thread(encode, own, sent, wire, base=Base(base, initial))
        own, blob = sent, blob_of(sent)
    with _timed(seconds, "upload"):
        await client.upload(own, blob, "weights", lambda *_: None)
        await client.contribute(
            state.round,
            weights=blob,
            shards=[],
            num_examples=10,
            score_local=None,
            initial_weights=initial,
        )
    return blob


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - started


def _peaks(server: int, trainer: int) -> dict[str, float]:
    return {"cloud-server": peak_bytes(server) / 2**20, "trainer": peak_bytes(trainer) / 2**20}


if __name__ == "__main__":
    sys.exit(main())
