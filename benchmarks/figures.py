"""The output of the benchmarks: one line of JSON on stdout, and a table on stderr if that is a terminal."""

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

# The line of JSON has so many significant digits, because timings are not more precise.
DIGITS = 5


def argument_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows the defaults, described by the first line of the module's docstring.

    Args:
        doc: the module's docstring.
    """
    return argparse.ArgumentParser(
        description=(doc or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the least and the greatest value; the median is the figure to quote."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Return the spread of over/under, pair by pair.

    The two values of a pair are measured one right after the other, when the machine is equally busy.
    """
    return spread([a / b for a, b in zip(over, under, strict=True)])


def machine() -> dict[str, Any]:
    """Describe the machine that the figures are taken on; the load shows if the machine was idle."""
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
