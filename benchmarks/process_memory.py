"""Peak memory of a process and its child processes."""

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import psutil

_SAMPLE_SECONDS = 0.02


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
