"""Processes under measurement: what they take, what they send, and an end for all of them. Linux only."""

import ctypes
import fcntl
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

ROOT = Path(__file__).parent.parent
STOP_SECONDS = 10.0
SAMPLE_SECONDS = 0.1

_CLONE_NEWNET = 0x40000000  # sched.h
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 1  # SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_T = TypeVar("_T")


class Processes:
    """The processes of one benchmark, by name; their output goes to `folder/NAME.log`.

    Raises:
        RuntimeError: from `wait_for`, when one of them failed or nothing came in time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start(
        self,
        name: str,
        command: Sequence[object],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> int:
        """Its process id, which is also that of its process group."""
        with self.log(name).open("wb") as output:
            self._started[name] = process = subprocess.Popen(
                [str(part) for part in command],
                cwd=cwd,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return process.pid

    def log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def wait_for(self, what: str, condition: Callable[[], _T | None], *, seconds: float) -> _T:
        """The condition's value, once it is neither None nor False."""
        deadline = time.monotonic() + seconds
        while True:
            value = condition()
            if value is not None and value is not False:
                return value
            for name, process in self._started.items():
                if process.poll():
                    raise RuntimeError(f"{name} failed while waiting for {what}:\n{self.tail(name)}")
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {name}\n{self.tail(name)}" for name in self._started)
                raise RuntimeError(f"no {what} in {seconds:.0f} s\n{logs}")
            time.sleep(0.01)

    def wait_for_output(self, name: str, pattern: str, *, seconds: float) -> str:
        """What the pattern's first group matches in the process's output."""

        def match() -> str | None:
            found = re.search(pattern, self.log(name).read_text("utf-8", "replace"))
            return found[1] if found else None

        return self.wait_for(f"{pattern!r} from {name}", match, seconds=seconds)

    def tail(self, name: str, num_lines: int = 15) -> str:
        return "\n".join(self.log(name).read_text("utf-8", "replace").splitlines()[-num_lines:])

    def stop(self) -> None:
        """End all that is left, the last started first, with everything that it started."""
        for process in reversed(self._started.values()):
            family = [process.pid, *_descendants(process.pid)]
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            for pid in family:  # a grandchild may have made itself a session of its own
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


@contextmanager
def processes_in(folder: Path) -> Iterator[Processes]:
    """None of them is left at the end, nor when SIGTERM comes."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    processes = Processes(folder)
    try:
        yield processes
    finally:
        processes.stop()
        signal.signal(signal.SIGTERM, before)


class Usage(NamedTuple):
    """What a process took: of the processors since the meter's start, of memory since its own."""

    cpu_seconds: float
    peak_mib: float


class Meter:
    """Watches processes; each is known by a name, and counted with all that it starts if it is a family.

    A single process's peak memory is the kernel's own (VmHWM). A family's is the largest sum of resident
    memory seen at one moment, and its processor time includes that of members that have ended.
    """

    def __init__(self, *, single: Mapping[str, int] | None = None, families: Mapping[str, int] | None = None):
        self._single = dict(single or {})
        self._families = dict(families or {})
        self._peaks = dict.fromkeys(self._families, 0)
        self._before: dict[str, float] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        if self._families:
            self._thread.start()

    def begin(self) -> None:
        """Count processor time from now on."""
        self._before = self._cpu_seconds()

    def end(self) -> dict[str, Usage]:
        self._is_over.set()
        seconds = self._cpu_seconds()
        peaks = {name: peak_bytes(pid) for name, pid in self._single.items()} | self._peaks
        return {
            name: Usage(seconds[name] - self._before.get(name, 0.0), peak / 2**20)
            for name, peak in peaks.items()
        }

    def _cpu_seconds(self) -> dict[str, float]:
        table = _table()
        single = {name: table[pid].own_ticks for name, pid in self._single.items()}
        families = {
            name: sum(table[each].all_ticks for each in [pid, *_descendants(pid, table)] if each in table)
            for name, pid in self._families.items()
        }
        return {name: ticks / _TICKS for name, ticks in {**single, **families}.items()}

    def _sample(self) -> None:
        while not self._is_over.wait(SAMPLE_SECONDS):
            table = _table()
            for name, pid in self._families.items():
                pids = [pid, *_descendants(pid, table)]
                total = sum(table[each].resident_bytes for each in pids if each in table)
                self._peaks[name] = max(self._peaks[name], total)


def peak_bytes(pid: int | str = "self") -> int:
    """The most physical memory that the process has had so far (VmHWM)."""
    for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak() -> int:
    """Forget this process's peak memory, and what it has freed; the bytes that it has now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", "utf-8")
    return peak_bytes()


def children(pid: int) -> list[int]:
    return [child for child, entry in _table().items() if entry.parent == pid]


def own_network() -> bool:
    """Move this process, and all that it starts from now on, to a network that nothing else uses.

    Its loopback interface then counts the benchmark's bytes and no others. Call it before there are threads.

    Returns:
        Whether the system permits it.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as interface:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(interface, _GET_FLAGS, request))[1]
        fcntl.ioctl(interface, _SET_FLAGS, struct.pack("16sh14x", b"lo", flags | _UP))
    return True


def loopback_bytes() -> int:
    """Sent over loopback so far, headers of TCP and IP included."""
    for line in Path("/proc/self/net/dev").read_text("utf-8").splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    return 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class _Entry(NamedTuple):
    parent: int
    own_ticks: int
    all_ticks: int  # with those of children that have ended
    resident_bytes: int


def _table() -> dict[int, _Entry]:
    """Every process there is."""
    table = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            text = (folder / "stat").read_text("utf-8", "replace")
            fields = text.rpartition(")")[2].split()  # from the third on; the second may hold spaces
            user, system, ended_user, ended_system = map(int, fields[11:15])
            own = user + system
            table[int(folder.name)] = _Entry(
                parent=int(fields[1]),
                own_ticks=own,
                all_ticks=own + ended_user + ended_system,
                resident_bytes=int(fields[21]) * _PAGE_BYTES,
            )
    return table


def _descendants(pid: int, table: Mapping[int, _Entry] | None = None) -> list[int]:
    table = _table() if table is None else table
    found = [pid]
    for each in found:  # grows while it is walked
        found += [child for child, entry in table.items() if entry.parent == each]
    return found[1:]
