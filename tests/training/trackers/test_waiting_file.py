"""Lines that a disk rejects wait, whole, and give one warning."""

from pathlib import Path

import pytest
from file_size_limit import file_size_limit

from megatron_step.training.trackers import waiting_file
from megatron_step.training.trackers.waiting_file import WaitingFile

RECORDS = [f"record {number}\n".encode() for number in range(8)]


def test_records_wait_for_room_and_are_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "folder" / "file"
    file = WaitingFile(path)
    with file_size_limit(24):  # two records and a half
        for record in RECORDS[:6]:
            file.add(record)
        assert path.read_bytes() == b"".join(RECORDS)[:24]
    for record in RECORDS[6:]:
        file.add(record)
    assert path.read_bytes() == b"".join(RECORDS)
    file.close()
    said = capsys.readouterr().err
    assert said == f"warning: cannot write {path}: File too large; training goes on, and records wait in memory\n"


@pytest.mark.parametrize("kind", ["full disk", "folder in its place", "parent is a file"])
def test_a_file_that_is_never_written_is_said_at_its_end(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    if kind == "full disk":
        path.symlink_to("/dev/full")
        reason = "No space left on device"
    elif kind == "folder in its place":
        path.mkdir()
        reason = "Is a directory"
    else:
        path.write_text("")
        path, reason = path / "below", "File exists"
    file = WaitingFile(path)
    for record in RECORDS:
        file.add(record)
    file.close()
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"warning: cannot write {path}: {reason}")
    assert said[1:] == [f"warning: the last records of {path} are missing: {reason}"]


def test_a_file_that_can_be_written_later_gets_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.mkdir()
    file = WaitingFile(path)
    file.add(RECORDS[0])
    path.rmdir()
    file.add(RECORDS[1])
    file.close()
    assert path.read_bytes() == RECORDS[0] + RECORDS[1]


def test_a_file_is_prepared_once_before_its_first_record(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    calls = []

    def prepare(path: Path) -> None:
        calls.append(path.read_bytes())
        if len(calls) == 1:
            raise PermissionError(13, "Permission denied")

    file = WaitingFile(path, prepare)
    file.add(RECORDS[0])
    file.add(RECORDS[1])
    file.close()
    assert calls == [b"old", b"old"]
    assert path.read_bytes() == b"old" + RECORDS[0] + RECORDS[1]


def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting_file, "_MOST_WAITING_BYTES", 20)
    path = tmp_path / "file"
    path.mkdir()
    file = WaitingFile(path)
    for record in RECORDS:
        file.add(record)
    path.rmdir()
    file.close()
    assert path.read_bytes() == RECORDS[0] + RECORDS[1]
