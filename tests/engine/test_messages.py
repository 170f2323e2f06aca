"""A stream that takes nothing neither ends training nor changes the exit status."""

import os
import subprocess
import sys

import pytest

from megatron_step.engine.messages import say, warn


def test_lines_and_warnings_have_their_streams(capsys: pytest.CaptureFixture[str]) -> None:
    say("a line")
    warn("of a disk")
    assert capsys.readouterr() == ("a line\n", "warning: of a disk\n")


PROGRAM = """
import sys
from megatron_step.engine.messages import discard_unwritten, say, warn
for number in range(20000):
    say(f"line {number}")
warn("the end")
discard_unwritten()
sys.exit(75)
"""


def test_a_full_disk_behind_the_output_is_said_once() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", PROGRAM], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 75
    assert ended.stderr.splitlines() == [
        "warning: cannot write to standard output: No space left on device; training goes on",
        "warning: the end",
    ]


def test_both_streams_may_be_full() -> None:
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", PROGRAM], stdout=full, stderr=full).returncode == 75


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_a_stream_may_be_closed_from_the_start(closed: str) -> None:
    command = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, PROGRAM]
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert ended.returncode == 75


def test_letters_that_the_encoding_lacks_do_not_end_training() -> None:
    program = PROGRAM.replace('say(f"line {number}")', "say('runs/\u00f8')")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert ended.returncode == 75
    assert ended.stderr.count("cannot write to standard output: 'ascii' codec") == 1


def test_a_closed_pipe_does_not_end_training() -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 75
    assert said.count("Broken pipe") == 1
