"""A new folder is there as a whole or not at all."""

import shutil
from multiprocessing import Event, Process
from multiprocessing.synchronize import Event as EventType
from pathlib import Path

import pytest

from megatron_step.engine.output_lock import InUseError
from megatron_step.huggingface.new_folder import new_folder


def test_a_folder_gets_its_name_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "in/.out.partial").mkdir(parents=True)
    (tmp_path / "in/.out.partial/old").write_text("of a killed process")
    with new_folder(tmp_path / "in/out", 0) as folder:
        (folder / "inner").mkdir()
        (folder / "inner/file").write_text("text")
        assert not (tmp_path / "in/out").exists()
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "in/out").iterdir()] == ["inner"]


def test_nothing_is_left_of_one_that_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", 0) as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_stands_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="already exists"), new_folder(tmp_path, 0):
        pass
    needed = shutil.disk_usage(tmp_path).total * 2
    with pytest.raises(OSError, match="MiB are free"), new_folder(tmp_path / "out", needed):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    writing, done = Event(), Event()
    other = Process(target=_write_slowly, args=(tmp_path / "out", writing, done))
    other.start()
    assert writing.wait(60)
    with pytest.raises(InUseError, match=f"out is in use by process {other.pid}"), new_folder(tmp_path / "out", 0):
        pass
    done.set()
    other.join()
    assert (tmp_path / "out" / "file").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _write_slowly(path: Path, writing: EventType, done: EventType) -> None:
    with new_folder(path, 0) as folder:
        (folder / "file").write_text("whole")
        writing.set()
        done.wait(60)
