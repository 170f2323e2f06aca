"""Two agents on this machine stand for two machines."""

import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from small_corpus import REPOSITORY


def test_two_machines_train_together(tmp_path: Path, tiny: list[str], environment: dict[str, str]) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    layout = ["--parallel.tensor_parallel_size", "1", "--parallel.sequence_parallel", "false"]
    overrides = [*tiny, *layout, "--output_dir", str(tmp_path), "--stages.steps", "3"]
    command = ["examples/multi_node/run.sh", "2", endpoint, "1", *overrides]
    machines = [
        subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, stderr=subprocess.PIPE) for _ in range(2)
    ]
    try:
        errors = [machine.communicate(timeout=300)[1] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], errors
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    manifest = json.loads((tmp_path / "checkpoints/step_00000003/manifest.json").read_text())
    assert manifest["layout"]["pipeline_parallel_size"] == 2, "the two machines hold a half of the layers each"


def test_says_how_to_use_it(run_script: Callable) -> None:
    finished = run_script(["examples/multi_node/run.sh", "2"])
    assert finished.returncode == 2
    assert "usage:" in finished.stderr
