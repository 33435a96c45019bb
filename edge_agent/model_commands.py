"""The commands about the model in use: history, predict, export, roll-back.

All but roll-back only read the state directory, and so may run beside the agent.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecavg.common import cli
from ecavg.common.errors import RunError, UsageError
from ecavg.common.layers import load
from ecavg.edge_agent.config import ENV_PREFIX, ModelConfig, check_exporter

if TYPE_CHECKING:
    from ecavg.edge_agent.exporting import Deployed
    from ecavg.edge_agent.history import History, Use
    from ecavg.edge_agent.state import AgentState

# So many classes are shown of each picture.
NUM_CLASSES = 5
SUFFIXES = {"onnx": "onnx", "torch-export": "pt2"}


def history(argv: Sequence[str]) -> int:
    """Run `edge-agent history`: show the models that were in use.

    Raises:
        UsageError: no model is in use yet.
        RunError: stdout cannot be written.
    """
    parser = cli.Parser(
        prog="edge-agent history",
        description="Show the models that were in use on this device, the one in use last.",
    )
    parser.add_argument("--json", action="store_true", help="all that is known of each, as JSON")
    config, own = _parsed(parser, argv, "json")
    history = _history(config)
    history.latest()
    uses = history.uses()
    if own["json"]:
        shown = [{**use.model_dump(), "is_kept": history.is_kept(use)} for use in uses]
        cli.print_result(json.dumps(shown, indent=2))
    else:
        cli.print_result("\n".join(_line(history, use) for use in uses))
    return 0


def predict(argv: Sequence[str]) -> int:
    """Run `edge-agent predict`: show what the model in use says of pictures.

    Raises:
        UsageError: no model is in use yet, or a picture cannot be read.
        RunError: stdout cannot be written.
    """
    parser = cli.Parser(
        prog="edge-agent predict",
        description="Show the most probable classes of pictures, by the model in use.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=Path, help="picture file")
    parser.add_argument("--json", action="store_true", help="the classes and probabilities as JSON")
    config, own = _parsed(parser, argv, "images", "json")
    history = _history(config)
    use = history.latest()
    model = _model(history, use, config)
    from ecavg.edge_agent.prediction import predict

    guesses = predict(model, history.run_of(use), own["images"], NUM_CLASSES)
    if own["json"]:
        shown = {str(path): [guess._asdict() for guess in found] for path, found in guesses.items()}
        cli.print_result(json.dumps(shown, indent=2))
        return 0
    for path, found in guesses.items():
        classes = ", ".join(f"{guess.label} {guess.probability:.1%}" for guess in found)
        cli.print_result(f"{path}: {classes}")
    return 0


def export(argv: Sequence[str]) -> int:
    """Run `edge-agent export`: write the model in use for inference.

    Raises:
        UsageError: no model is in use yet, a package is missing, or the format is unknown.
        RunError: the model cannot be exported.
    """
    parser = cli.Parser(
        prog="edge-agent export",
        description="Write the model in use as a file that takes inputs as they are, for an inference process"
        " that needs nothing of this program. Its outputs are compared with PyTorch's first.",
    )
    parser.add_argument("--format", choices=sorted(SUFFIXES), default="onnx", help="(default: onnx)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="(default: model.onnx, or model.pt2)")
    config, own = _parsed(parser, argv, "format", "output")
    check_exporter(own["format"])
    history = _history(config)
    use = history.latest()
    from ecavg.edge_agent.exporting import export

    output = own["output"] or Path(f"model.{SUFFIXES[own['format']]}")
    try:
        export(history.run_of(use), use, history.weights(use), own["format"], output, config.allow_factory)
    except OSError as error:
        raise UsageError(f"{output} cannot be written ({error.strerror}): name another --output") from error
    cli.print_done(f"wrote {output}: the {use.source} model of round {use.round}")
    return 0


def roll_back(argv: Sequence[str]) -> int:
    """Run `edge-agent roll-back`: use an earlier model again, and tell `on_update` of it.

    Raises:
        UsageError: the agent runs, or no such model is kept.
    """
    parser = cli.Parser(
        prog="edge-agent roll-back",
        description="Use an earlier model again: that of a round, or the one before the model in use."
        " The agent must not run meanwhile. It takes the next model that is published as usual.",
    )
    parser.add_argument("round", nargs="?", metavar="ROUND", type=int, help="(default: the model before)")
    config, own = _parsed(parser, argv, "round")
    folder = _folder(config)
    _history(config).latest()
    from ecavg.edge_agent.state import user_of

    if process := user_of(folder):
        raise UsageError(
            f"the edge-agent with process id {process} runs: stop it, roll back, and start it again"
        )
    return cli.run("edge-agent roll-back", lambda: _do_roll_back(config, own["round"]))


async def _do_roll_back(config: ModelConfig, number: int | None) -> int:
    from ecavg.common import logs
    from ecavg.edge_agent.metrics import AgentMetrics
    from ecavg.edge_agent.state import AgentState
    from ecavg.edge_agent.updating import Updates
    from ecavg.edge_agent.worker import Worker

    logs.set_up(config.log_level, config.log_format, quiet=config.quiet)
    worker = Worker(cli.print_status)
    with closing(AgentState(_folder(config), config.agent_id)) as state, closing(worker):
        use = _history(config).roll_back(number)
        if use is None:
            which = "older model" if number is None else f"other model of round {number}"
            raise UsageError(f"no {which} is kept: `edge-agent history` shows those that are")
        _forget_arrived(state)
        told = await Updates(config, state, worker, AgentMetrics(), cli.print_status).tell()
    done = f"rolled back to the model of round {use.round} ({use.digest[:12]})"
    if told.failure:
        raise RunError(f"{done}, but {told.failure}")
    cli.print_done(done)
    return 0


def _forget_arrived(state: "AgentState") -> None:
    """Have the agent not take the model that it was about to report."""
    arrived = state.progress.arrived
    if arrived and arrived.report.applied:
        report = arrived.report.model_copy(
            update={"applied": False, "reason": "rolled back by the user of the device"}
        )
        arrived = arrived.model_copy(update={"report": report})
        state.save(state.progress.model_copy(update={"arrived": arrived}))


MODEL_COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "history": history,
    "predict": predict,
    "export": export,
    "roll-back": roll_back,
}


def _parsed(parser: cli.Parser, argv: Sequence[str], *own: str) -> tuple[ModelConfig, dict[str, Any]]:
    """Return the agent's configuration, and the values of the command's own arguments."""
    cli.add_flags(parser, ModelConfig, None)
    flags = vars(parser.parse_args(argv))
    values = {name: flags.pop(name) for name in own}
    config_file = flags.pop("config")
    config = load(
        ModelConfig,
        env_prefix=ENV_PREFIX,
        preset=None,
        config_file=config_file,
        flags=flags,
        environ=os.environ,
    )
    return config, values


def _folder(config: ModelConfig) -> Path:
    from ecavg.edge_agent.state import default_directories

    return config.state_dir or default_directories(config.agent_id)[0]


def _history(config: ModelConfig) -> "History":
    from ecavg.edge_agent.history import History

    return History(_folder(config), config.keep_models, config.max_file_bytes)


def _model(history: "History", use: "Use", config: ModelConfig) -> "Deployed":
    # Imported here, because PyTorch takes seconds.
    from ecavg.edge_agent.exporting import Deployed

    return Deployed(history.run_of(use), history.weights(use), config.allow_factory)


def _line(history: "History", use: "Use") -> str:
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(use.at))
    kept = "kept" if history.is_kept(use) else "removed"
    scores = f"{use.metric} {_shown(use.score_before)} → {_shown(use.score)}"
    failed = f", {use.failure}" if use.failure else ""
    return f"{at}  round {use.round}  {use.source:<11}  {use.digest[:12]}  {scores}, {kept}{failed}"


def _shown(score: float | None) -> str:
    return "none" if score is None else f"{score:.4f}"
