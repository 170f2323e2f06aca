"""A command whose reader goes ends its work quietly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_RUN = "import sys; from megatron_step.cli.output import reader_may_go\nwith reader_may_go(): "


def _run(code: str) -> tuple[int, bytes]:
    """Exit status and standard error of Python code whose reader has closed the pipe."""
    read, write = os.pipe()
    os.close(read)
    try:
        process = subprocess.run([sys.executable, "-c", _RUN + code], stdout=write, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(write)
    return process.returncode, process.stderr


@pytest.mark.parametrize("flush", [True, False])
def test_work_goes_on_when_nobody_reads(tmp_path: Path, flush: bool) -> None:
    done = tmp_path / "done"
    code = f"print('line ' * 20_000, flush={flush}); print('more'); open({str(done)!r}, 'w').close()"
    assert _run(code) == (0, b"")
    assert done.exists()


def test_a_stream_without_a_file_stays(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_step.cli.output import reader_may_go

    with reader_may_go():
        print("seen")
    assert capsys.readouterr().out == "seen\n"


def test_what_is_printed_arrives_in_full(tmp_path: Path) -> None:
    code = "print('ø' * 100_000); print('error', file=sys.stderr)"
    found = subprocess.run([sys.executable, "-c", _RUN + code], capture_output=True, check=True, timeout=60)
    assert found.stdout.decode() == "ø" * 100_000 + "\n"
    assert found.stderr == b"error\n"
