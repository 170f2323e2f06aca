"""A lock refuses a second process, ends with its holder, and goes by signs of life where the system has none."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from megatron_step.engine import output_lock as module
from megatron_step.engine.output_lock import InUseError, lock_beside, output_lock, read_token

_HOLDER = """
import sys, time
from pathlib import Path
from megatron_step.engine.output_lock import output_lock
folder, stopping = Path(sys.argv[1]), sys.argv[2] == "stopping"
with output_lock(folder / ".lock", folder, lambda: stopping):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOKING_SECONDS", 0.5)
    monkeypatch.setattr(module, "_SILENT_SECONDS", 1.5)
    monkeypatch.setattr(module, "_SETTLING_SECONDS", 0.1)
    for name in module._JOBS:
        monkeypatch.delenv(name, raising=False)


class Holder:
    """Another process that holds the lock of a folder."""

    def __init__(self, folder: Path, state: str = "running", **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _HOLDER, str(folder), state],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.communicate("\n")


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    held = Holder(tmp_path / "run")
    yield held
    held.end()


def test_a_second_process_is_refused_and_told_who_has_it(tmp_path: Path, holder: Holder) -> None:
    run = tmp_path / "run"
    before = (run / ".lock").read_bytes()
    who = f"{run} is in use by process {holder.process.pid} on {socket.gethostname()} since .*choose another output"
    with pytest.raises(InUseError, match=who), output_lock(run / ".lock", run):
        pass
    assert (run / ".lock").read_bytes() == before
    holder.end()
    with output_lock(run / ".lock", run) as token:
        assert token


def test_a_crash_releases_it(tmp_path: Path, holder: Holder) -> None:
    run = tmp_path / "run"
    holder.process.send_signal(signal.SIGKILL)
    holder.process.wait()
    assert (run / ".lock").exists()
    start = monotonic()
    with output_lock(run / ".lock", run):
        pass
    assert monotonic() - start < 1


def test_nothing_is_left_but_what_others_wrote(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    with output_lock(run / ".lock", run):
        assert (run / ".lock").exists()
    assert list(tmp_path.iterdir()) == []
    with output_lock(run / ".lock", run):
        (run / "kept").touch()
    assert [path.name for path in run.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("state", "environment"), [("stopping", {}), ("running", {"SLURM_JOB_ID": "7"})], ids=["stopping", "same job"]
)
def test_a_restart_waits_for_the_holder_to_go(
    tmp_path: Path,
    state: str,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, holder = tmp_path / "run", Holder(tmp_path / "run", state, **environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    while state == "stopping" and not json.loads((run / ".lock").read_bytes())["stopping"]:
        sleep(0.05)
    threading.Timer(1.5, holder.end).start()  # longer than anyone else waits
    with output_lock(run / ".lock", run):
        pass
    assert f"waiting up to 60 s for process {holder.process.pid}" in capsys.readouterr().err


def _record_of(path: Path, **changes: Any) -> bytes:
    """Return the record of a process on this machine, with changed fields."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps({**module._own_record(), **changes}).encode().ljust(module._RECORD_BYTES))
    return path.read_bytes()


def test_a_dead_holder_on_another_machine_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = tmp_path / "run" / ".lock"
    _record_of(lock, host="elsewhere", process=12)
    start = monotonic()
    with output_lock(lock, lock.parent):
        assert monotonic() - start > 1.5
    assert "was in use by process 12 on elsewhere" in capsys.readouterr().err


def test_a_living_holder_on_another_machine_counts_though_its_lock_does_not_reach(tmp_path: Path) -> None:
    lock, done = tmp_path / "run" / ".lock", threading.Event()
    _record_of(lock, host="elsewhere", process=12)

    def beat() -> None:
        for number in range(1, 1000):
            if done.wait(0.2):
                return
            with lock.open("r+b") as file:
                file.write(json.dumps({**module._own_record(), "host": "elsewhere", "beat": number}).encode())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(InUseError, match="on elsewhere"), output_lock(lock, lock.parent):
            pass
    finally:
        done.set()
        thread.join()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail as on a file system without locks."""

    def lockf(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "lockf", lockf)


def test_without_locks_a_living_process_counts(tmp_path: Path, holder: Holder, no_locks: None) -> None:
    run = tmp_path / "run"
    with pytest.raises(InUseError, match=f"process {holder.process.pid}"), output_lock(run / ".lock", run):
        pass


def test_without_locks_a_dead_process_does_not_count(tmp_path: Path, holder: Holder, no_locks: None) -> None:
    run = tmp_path / "run"
    holder.process.kill()
    holder.process.wait()
    with output_lock(run / ".lock", run) as token:
        assert read_token(run / ".lock") == token


def test_without_locks_another_process_of_the_same_number_does_not_count(tmp_path: Path, no_locks: None) -> None:
    lock = tmp_path / "run" / ".lock"
    _record_of(lock, started=12.0)
    with output_lock(lock, lock.parent) as token:
        assert read_token(lock) == token


def test_a_damaged_record_does_not_count(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    for content in (b"", b"{", b"[]", b"3", b'{"host": 1}'):
        lock.write_bytes(content)
        with output_lock(lock, tmp_path) as token:
            assert read_token(lock) == token


def test_the_holder_shows_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BEAT_SECONDS", 0.0)
    with output_lock(tmp_path / ".lock", tmp_path):
        before = (tmp_path / ".lock").read_bytes()
        deadline = monotonic() + 10
        while (tmp_path / ".lock").read_bytes() == before:
            assert monotonic() < deadline
            sleep(0.05)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = tmp_path / "file"
    with pytest.raises(OSError, match=f"cannot write to {file}"), output_lock(file / ".lock", file):
        pass


def test_the_lock_of_a_whole_output_lies_beside_it() -> None:
    assert lock_beside(Path("models/step")) == Path.cwd() / "models" / ".step.lock"
