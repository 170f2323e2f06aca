"""A lock file that lets one process at a time write an output, and that a crash releases.

The operating system's lock on the file (POSIX, which NFS supports) ends with the process that holds it. Some file
systems have no locks, or locks that hold on one machine only. For these the file also holds a record of its holder, as
JSON, which the holder changes every few seconds. A process that finds a record of another machine waits to see whether
the record changes.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep, strftime
from typing import Any

import psutil

_BEAT_SECONDS = 5.0
_SILENT_SECONDS = 30.0  # silence after which a holder on another machine counts as dead
_LOOKING_SECONDS = 3.0  # wait for a holder to end
_RESTART_SECONDS = 60.0  # wait for a holder that is stopping, and of a restarted job for its former process
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_RECORD_BYTES = 512
_FIELDS = {"host", "process", "started", "since", "token"}
_SETTLING_SECONDS = 1.0  # wait on a system without locks, until one process's record has won
_JOBS = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "PBS_JOBID", "LSB_JOBID")


class InUseError(ValueError):
    """Error for an output that another process is writing."""


@contextmanager
def output_lock(path: Path, output: Path, is_stopping: Callable[[], bool] = lambda: False) -> Iterator[str]:
    """Hold the lock file `path` of `output` during the block, and give the block the file's token.

    Missing folders are made. At the end the file is removed, and the folders made here if they are empty.
    `is_stopping` returns whether this process was asked to end; other processes then wait for it.

    Raises InUseError, with host and process, if another process holds the lock, and OSError if the file cannot be
    written.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    descriptor = -1
    try:
        try:
            descriptor, is_locked = _take(path, output)
            record = _own_record()
            _write(descriptor, record)
        except OSError as error:
            raise OSError(f"cannot write to {path.parent}: {error.strerror}") from error
        if not is_locked:
            sleep(_SETTLING_SECONDS)
            if read_token(path) != record["token"]:
                raise InUseError(
                    f"{output} is in use by another process that began at the same time: choose another output"
                )
        done = threading.Event()
        beat = threading.Thread(target=_beat, args=(descriptor, record, is_stopping, done), daemon=True)
        beat.start()
        try:
            yield record["token"]
        finally:
            done.set()
            beat.join()
            path.unlink(missing_ok=True)  # while still locked: the next process to lock it finds its name gone
    finally:
        if descriptor >= 0:
            os.close(descriptor)
        for folder in made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def lock_beside(output: Path) -> Path:
    """Return the path of an output's lock file: a hidden file beside the output."""
    return output.absolute().with_name(f".{output.absolute().name}.lock")


def read_token(path: Path) -> str | None:
    """Return the token of a lock file that another process holds, or None if there is none."""
    with suppress(OSError):
        return _parse(path.read_bytes()).get("token")
    return None


def _take(path: Path, output: Path) -> tuple[int, bool]:
    """Wait until no other process holds the lock file; return its descriptor, and whether the system locked it.

    Raises InUseError if another process keeps the lock.
    """
    start, said = monotonic(), False
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # its last holder has just removed the folder
        is_locked, held = _try_lock(descriptor)
        record = _parse(os.pread(descriptor, _RECORD_BYTES, 0))
        try:
            if not held and not _is_same_file(descriptor, path):
                continue
            if not held and not _shows_life(descriptor, record, is_locked, output):
                taken, descriptor = descriptor, -1
                return taken, is_locked
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        waits = record.get("stopping") or (_job() is not None and record.get("job") == _job())
        holder = f"process {record.get('process', 'unknown')} on {record.get('host', 'an unknown host')}"
        if monotonic() - start > (_RESTART_SECONDS if waits else _LOOKING_SECONDS):
            since = record.get("since", "an unknown time")
            raise InUseError(
                f"{output} is in use by {holder} since {since}: wait until that process ends, or choose another output"
            )
        if waits and not said:
            said = True
            _say(f"{output}: waiting up to {_RESTART_SECONDS:.0f} s for {holder} to end")
        sleep(0.2)


def _try_lock(descriptor: int) -> tuple[bool, bool]:
    """Return whether this process now has the lock, and whether another has it; both False on systems without locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False, False
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False, True
        raise
    return True, False


def _shows_life(descriptor: int, record: dict[str, Any], is_locked: bool, output: Path) -> bool:
    """Return whether the process of a leftover record still runs, although the system's lock is free."""
    if not record:
        return False
    if record["host"] == socket.gethostname():
        return not is_locked and _is_alive(record)
    _say(
        f"{output} was in use by process {record['process']} on {record['host']}, which left its lock file behind: "
        f"waiting {_SILENT_SECONDS:.0f} s to see whether it still runs"
    )
    deadline = monotonic() + _SILENT_SECONDS
    while monotonic() < deadline:
        sleep(0.5)
        if _parse(os.pread(descriptor, _RECORD_BYTES, 0)) != record:
            return True
    return False


def _is_same_file(descriptor: int, path: Path) -> bool:
    """Return whether `path` still names the locked file: its last holder may have removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _is_alive(record: dict[str, Any]) -> bool:
    """Return whether the process of a record runs; its start time tells it from a later process of the same number."""
    with suppress(psutil.NoSuchProcess):
        return abs(psutil.Process(record["process"]).create_time() - record["started"]) < 1
    return False


def _own_record() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "started": psutil.Process().create_time(),
        "since": strftime("%Y-%m-%d %H:%M:%S"),
        "job": _job(),
        "token": uuid.uuid4().hex,
        "stopping": False,
        "beat": 0,
    }


def _job() -> str | None:
    """Return the job's id, which its restarts share, or None if the launcher sets none."""
    named = [f"{name}={os.environ[name]}" for name in _JOBS if os.environ.get(name, "none") != "none"]
    return " ".join(named) or None


def _beat(descriptor: int, record: dict[str, Any], is_stopping: Callable[[], bool], done: threading.Event) -> None:
    """Change the record every few seconds, and at once when the process is asked to stop."""
    written = monotonic()
    while not done.wait(0.2):
        if monotonic() - written > _BEAT_SECONDS or is_stopping() != record["stopping"]:
            written = monotonic()
            record["beat"] += 1
            record["stopping"] = is_stopping()
            with suppress(OSError):  # a full disk must not end a run; the lock still holds
                _write(descriptor, record)


def _write(descriptor: int, record: dict[str, Any]) -> None:
    """Write a record in place, always with the same length, so that a reader never sees a mix of two records."""
    os.pwrite(descriptor, json.dumps(record).encode().ljust(_RECORD_BYTES), 0)
    os.fsync(descriptor)


def _parse(content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(content)
        return record if record.keys() >= _FIELDS else {}
    except (ValueError, AttributeError):
        return {}  # an empty file: its process has not written yet, or died before it could


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
