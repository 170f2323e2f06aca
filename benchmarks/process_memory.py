"""Peak memory of a process and its child processes."""

import multiprocessing
import re
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil

_SAMPLE_SECONDS = 0.02
_PRIVATE = re.compile(r"^Private_\w+: +(\d+) kB", re.MULTILINE)


def process_peak_bytes(function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    """Run `function(*arguments)` in a separate process, and return its peak bytes, with its child processes.

    Raises RuntimeError if the process fails.
    """
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    peak_bytes = 0
    while process.is_alive():
        peak_bytes = max(peak_bytes, _tree_bytes(process.pid))
        time.sleep(_SAMPLE_SECONDS)
    if process.exitcode:
        raise RuntimeError(f"the measured process ended with exit code {process.exitcode}: see its error above")
    return peak_bytes


def _tree_bytes(pid: int | None) -> int:
    """Resident bytes of a process and its child processes; shared pages count for each process."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.NoSuchProcess:  # the process ended meanwhile
        pass
    return total


class AddedMemory:
    """Within its block, measures the memory that this process and its child processes add, on Linux.

    The pages that a forked process shares with this one count once.
    """

    def __init__(self) -> None:
        self.own_bytes = 0
        """The most that this process has added."""
        self.child_bytes = 0
        """The most that the child processes have for themselves."""

    def __enter__(self) -> "AddedMemory":
        self._process = psutil.Process()
        self._start_bytes = self._anonymous_bytes()
        self._ended = Event()
        self._thread = Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS / 4):
            self.own_bytes = max(self.own_bytes, self._anonymous_bytes() - self._start_bytes)
            children = self._process.children(recursive=True)
            self.child_bytes = max(self.child_bytes, sum(_private_bytes(child.pid) for child in children))

    def _anonymous_bytes(self) -> int:
        memory = self._process.memory_info()
        return int(memory.rss - memory.shared)


def _private_bytes(pid: int) -> int:
    """Bytes of pages that a process does not share; 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return 1024 * sum(map(int, _PRIVATE.findall(text)))
