"""The measured processes: their start and end, their processor time, memory and network bytes. Linux only."""

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

# CLONE_NEWNET in Linux's sched.h.
_CLONE_NEWNET = 0x40000000
# SIOCGIFFLAGS, SIOCSIFFLAGS and IFF_UP of Linux.
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 1
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_T = TypeVar("_T")


class Processes:
    """The processes of one benchmark, by name; the output of each goes to `folder/NAME.log`."""

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
        """Start a process, and return its id, which is also the id of its process group."""
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
        """Wait until the condition's value is neither None nor False, and return the value.

        Args:
            what: the name of the awaited state, for error messages.

        Raises:
            RuntimeError: a process failed, or the condition did not hold in time.
        """
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
        """Wait until the pattern matches in the process's output, and return the first group of the match.

        Raises:
            RuntimeError: a process failed, or the pattern did not match in time.
        """

        def match() -> str | None:
            found = re.search(pattern, self.log(name).read_text("utf-8", "replace"))
            return found[1] if found else None

        return self.wait_for(f"{pattern!r} from {name}", match, seconds=seconds)

    def wait_for_end(self, name: str, *, seconds: float) -> None:
        """Wait until the process has ended.

        Raises:
            RuntimeError: a process failed, or this one did not end in time.
        """
        process = self._started[name]
        self.wait_for(f"end of {name}", lambda: process.poll() is not None, seconds=seconds)

    def tail(self, name: str, num_lines: int = 15) -> str:
        return "\n".join(self.log(name).read_text("utf-8", "replace").splitlines()[-num_lines:])

    def stop(self) -> None:
        """End all processes with their descendants, in the reverse order of their start."""
        for process in reversed(self._started.values()):
            family = [process.pid, *_descendants(process.pid)]
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            # A descendant with a session of its own did not get the group's signal.
            for pid in family:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


@contextmanager
def processes_in(folder: Path) -> Iterator[Processes]:
    """Return a context whose processes are all stopped at its end, also when SIGTERM comes."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    processes = Processes(folder)
    try:
        yield processes
    finally:
        processes.stop()
        signal.signal(signal.SIGTERM, before)


class Usage(NamedTuple):
    """The processor time of a process since `Meter.begin`, and its peak memory since the process started."""

    cpu_seconds: float
    peak_mib: float


class Meter:
    """A meter of the processor time and peak memory of processes, by name.

    A family is a process with all its descendants. The peak memory of a single process is the kernel's own
    figure (VmHWM). The peak memory of a family is the largest sum of resident memory in the samples, and the
    processor time of a family includes the time of members that have ended.
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
        """Start to count processor time."""
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


def usage_of(pid: int) -> Usage:
    """Return the processor time of one process since it started, and its peak memory.

    Raises:
        OSError: there is no such process.
    """
    return Usage(_entry(Path(f"/proc/{pid}")).own_ticks / _TICKS, peak_bytes(pid) / 2**20)


def peak_bytes(pid: int | str = "self") -> int:
    """Return the peak physical memory of the process so far (VmHWM)."""
    return memory_bytes("VmHWM", pid)


def memory_bytes(what: str, pid: int | str = "self") -> int:
    """Return a figure of a process's memory, by its name in proc(5); 0 where the process has none."""
    for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak() -> int:
    """Return freed memory to the system, reset this process's peak, and return the bytes in use now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", "utf-8")
    return peak_bytes()


def children(pid: int) -> list[int]:
    return [child for child, entry in _table().items() if entry.parent == pid]


def own_network() -> bool:
    """Move this process, and every process that it starts later, into a network namespace of its own.

    The loopback interface then counts only the benchmark's bytes. Call this before the process has threads.

    Returns:
        False if the system does not permit a network namespace.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as interface:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(interface, _GET_FLAGS, request))[1]
        fcntl.ioctl(interface, _SET_FLAGS, struct.pack("16sh14x", b"lo", flags | _UP))
    return True


def loopback_bytes() -> int:
    """Return the bytes sent over loopback so far, with the headers of TCP and IP."""
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
    # These ticks include those of children that have ended.
    all_ticks: int
    resident_bytes: int


def _table() -> dict[int, _Entry]:
    """Return an entry for every process of the system, by process id."""
    table = {}
    for folder in Path("/proc").glob("[0-9]*"):
        # A process may end before its file is read.
        with suppress(OSError):
            table[int(folder.name)] = _entry(folder)
    return table


def _entry(folder: Path) -> _Entry:
    """Return the entry of the process whose folder in /proc this is."""
    text = (folder / "stat").read_text("utf-8", "replace")
    # The second field, in brackets, may hold spaces. The list begins with the third field.
    fields = text.rpartition(")")[2].split()
    user, system, ended_user, ended_system = map(int, fields[11:15])
    own = user + system
    return _Entry(
        parent=int(fields[1]),
        own_ticks=own,
        all_ticks=own + ended_user + ended_system,
        resident_bytes=int(fields[21]) * _PAGE_BYTES,
    )


def _descendants(pid: int, table: Mapping[int, _Entry] | None = None) -> list[int]:
    table = _table() if table is None else table
    found = [pid]
    # The list grows during the loop, so the loop reaches all generations.
    for each in found:
        found += [child for child, entry in table.items() if entry.parent == each]
    return found[1:]
