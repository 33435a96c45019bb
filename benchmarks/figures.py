"""How figures are summed up and shown: one JSON line on stdout, and a table where a person looks on."""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

DIGITS = 5  # significant, in the JSON line: timings have no more


def argument_parser(doc: str | None) -> argparse.ArgumentParser:
    """That shows defaults; described by the first line of a module's docstring."""
    return argparse.ArgumentParser(
        description=(doc or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest; the median is the figure to quote."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """The spread of over/under, pair by pair: what was measured one after the other had the same machine."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def machine() -> dict[str, Any]:
    """What the figures were taken on; the load tells whether it was idle."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("grpcio", "torch")},
    }


def emit(
    result: dict[str, Any], title: str, headings: Sequence[str], rows: Iterable[Sequence[object]]
) -> None:
    """Print the result as a line of JSON on stdout, and as a table on stderr if that is a terminal."""
    if sys.stderr.isatty():
        table = Table(title=title, caption=f"load before: {result['machine']['load_before']:.1f}")
        for index, heading in enumerate(headings):
            table.add_column(heading, justify="right" if index else "left")
        for row in rows:
            table.add_row(*(_cell(value) for value in row))
        Console(stderr=True).print(table)
    print(json.dumps(_rounded(result)), flush=True)


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return f"{_cell(value['median'])} ({_cell(value['min'])} to {_cell(value['max'])})"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e4 else f"{value}"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
