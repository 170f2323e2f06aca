"""The SLURM script, with stand-ins for srun and scontrol that run the tasks on this machine."""

from collections.abc import Callable
from pathlib import Path

import pytest

_SCONTROL = """#!/usr/bin/env bash
if [ "$1 $2" = "show hostnames" ]; then echo localhost; else echo "$@" >> "$SCONTROL_LOG"; fi
"""

# Starts one task a rank, as srun does; at the first line of $SIGNAL_AT it sends the tasks SIGUSR1, as SLURM does before
# the time is over. Its status is the largest of the tasks'.
_SRUN = """#!/usr/bin/env bash
[[ $1 == --wait=* ]] && shift
tasks=()
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & tasks+=($!)
done
if [ -n "${SIGNAL_AT:-}" ]; then
  until [ -s "$SIGNAL_AT" ] || ! kill -0 "${tasks[0]}"; do sleep 0.02; done
  kill -USR1 "${tasks[@]}"
fi
status=0
for task in "${tasks[@]}"; do wait "$task"; code=$?; ((code > status)) && status=$code; done
exit $status
"""


@pytest.fixture
def slurm(tmp_path: Path, environment: dict[str, str]) -> dict[str, str]:
    """Environment variables that SLURM sets for a job of two tasks."""
    for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(text)
        command.chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node-[0-1]", "SLURM_NTASKS": "2"}
    log = {"SCONTROL_LOG": str(tmp_path / "scontrol.log")}
    return {**job, **log, "PATH": f"{tmp_path / 'bin'}:{environment['PATH']}"}


def _requeued(slurm: dict[str, str]) -> str:
    log = Path(slurm["SCONTROL_LOG"])
    return log.read_text() if log.exists() else ""


def test_a_job_whose_time_is_over_goes_back_into_the_queue(
    tmp_path: Path, tiny: list[str], slurm: dict[str, str], run_script: Callable
) -> None:
    run = tmp_path / "run"
    layout = ["--parallel.tensor_parallel_size", "1", "--parallel.sequence_parallel", "false"]
    command = ["bash", "examples/slurm/run.sbatch", *tiny, *layout, "--output_dir", str(run), "--stages.steps", "150"]

    first = run_script(command, **slurm, SIGNAL_AT=str(run / "metrics.jsonl"))
    assert first.returncode == 0, first.stderr
    assert _requeued(slurm) == "requeue 4711\n"
    steps_of_first = len((run / "metrics.jsonl").read_text().splitlines())
    assert 1 <= steps_of_first < 150
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{steps_of_first:08d}"]

    second = run_script(command, **slurm)
    assert second.returncode == 0, second.stderr
    assert "resuming from" in second.stdout
    assert "trained to the end" in second.stdout
    assert _requeued(slurm) == "requeue 4711\n", "a job that is done is not put back"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 150


def test_a_job_that_fails_is_not_put_back(slurm: dict[str, str], run_script: Callable) -> None:
    command = ["bash", "examples/slurm/run.sbatch", "--stages.stepz", "1"]
    finished = run_script(command, **slurm)
    assert finished.returncode == 2
    assert "did you mean --stages.steps?" in finished.stderr
    assert _requeued(slurm) == ""
