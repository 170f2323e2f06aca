"""One process at a time writes an output: a lock that a crash releases, with a sign of life where locks do not reach.

The lock file holds who has it, as JSON, and the operating system's lock on it (POSIX, which NFS knows) ends with its
process. On file systems without locks, or whose locks hold on one machine only, the record counts: its holder changes
it every few seconds, and who finds one of another machine waits whether it changes.
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
_SILENT_SECONDS = 30.0  # of a holder on another machine, until it is taken for dead
_LOOKING_SECONDS = 3.0  # that anyone waits for a holder to go
_RESTART_SECONDS = 60.0  # that a restart of the holder's job waits for it, and everyone for a holder that is stopping
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_RECORD_BYTES = 512
_FIELDS = {"host", "process", "started", "since", "token"}
_SETTLING_SECONDS = 1.0  # after which the record on a system without locks is that of one process
_JOBS = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "PBS_JOBID", "LSB_JOBID")


class InUseError(ValueError):
    """Another process writes the same output."""


@contextmanager
def output_lock(path: Path, output: Path, is_stopping: Callable[[], bool] = lambda: False) -> Iterator[str]:
    """Hold the lock file `path` of `output` during the block; gives the token that the file holds.

    Folders that are missing are made; the file goes at the end, and with it folders that are then empty.
    `is_stopping` tells whether this process was asked to end: then others wait for it.

    Raises InUseError, naming host and process, if another process holds it, and OSError if it cannot be written.
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
                raise InUseError(f"{output} is in use by another process that began at the same time")
        done = threading.Event()
        beat = threading.Thread(target=_beat, args=(descriptor, record, is_stopping, done), daemon=True)
        beat.start()
        try:
            yield record["token"]
        finally:
            done.set()
            beat.join()
            path.unlink(missing_ok=True)  # while it is still locked: who locks it next sees that it has no name
    finally:
        if descriptor >= 0:
            os.close(descriptor)
        for folder in made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def lock_beside(output: Path) -> Path:
    """The lock file of an output that is written as a whole: hidden, in the folder that it will lie in."""
    return output.absolute().with_name(f".{output.absolute().name}.lock")


def read_token(path: Path) -> str | None:
    """The token of a lock file that another process holds, if it is there."""
    with suppress(OSError):
        return _parse(path.read_bytes()).get("token")
    return None


def _take(path: Path, output: Path) -> tuple[int, bool]:
    """A descriptor of the lock file, once nobody else holds it, and whether the system's lock is on it."""
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
                f"{output} is in use by {holder} since {since}: wait for its end, or choose another output"
            )
        if waits and not said:
            said = True
            _say(f"{output}: waiting up to {_RESTART_SECONDS:.0f} s for {holder} to end")
        sleep(0.2)


def _try_lock(descriptor: int) -> tuple[bool, bool]:
    """Whether this process now has the lock, and whether another one has it; neither on systems without locks."""
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
    """Whether the process of a record that it did not remove still runs, though the lock does not say so."""
    if not record:
        return False
    if record["host"] == socket.gethostname():
        return not is_locked and _is_alive(record)
    _say(
        f"{output} was in use by process {record['process']} on {record['host']}, which did not end in order: waiting "
        f"{_SILENT_SECONDS:.0f} s for a sign of life"
    )
    deadline = monotonic() + _SILENT_SECONDS
    while monotonic() < deadline:
        sleep(0.5)
        if _parse(os.pread(descriptor, _RECORD_BYTES, 0)) != record:
            return True
    return False


def _is_same_file(descriptor: int, path: Path) -> bool:
    """Whether the file that was locked still has its name: its holder may have removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _is_alive(record: dict[str, Any]) -> bool:
    """Whether the process of a record runs: its number may be another one's by now."""
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
    """What a job's restarts have in common, where the launcher says it."""
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
    """In place and always of one length: a reader never sees half of two records."""
    os.pwrite(descriptor, json.dumps(record).encode().ljust(_RECORD_BYTES), 0)
    os.fsync(descriptor)


def _parse(content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(content)
        return record if record.keys() >= _FIELDS else {}
    except (ValueError, AttributeError):
        return {}  # empty: made a moment ago, or by a process that died then


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
