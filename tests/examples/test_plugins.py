"""The example plugin trains with its operator and its policy and posts its metrics, by the config alone.

Its policy costs what the planner says, and computes in every layout what it computes in one process.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from serial_oracle import PP2, SP, differences, train, write_checkpoint
from small_corpus import REPOSITORY
from small_run import VOCAB_SIZE, small_config
from worlds import Worlds

from megatron_step.config.data import DataConfig
from megatron_step.config.load import config_text
from megatron_step.config.plugins import import_plugins
from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import parallel_layout
from megatron_step.plan.resolved import resolve
from megatron_step.planner.costs.memory import RankMemory, stage_memory
from megatron_step.planner.plan import make_plan
from megatron_step.training.memory import measure_states
from megatron_step.training.state import build_state

FOLDER = REPOSITORY / "examples" / "plugins"


class _Server(HTTPServer):
    lines: list[dict]


class _Collect(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        self.server.lines.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server(("localhost", 0), _Collect) as server:
        server.lines = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_run_with_the_plugin(server: _Server, tmp_path: Path, small_data: DataConfig) -> None:
    stages = {"count": 2, "layers": [2, 2], "steps": 2}
    config = small_config(str(tmp_path / "run"), data=small_data, stages=stages, growth={"init": "identity"})
    (tmp_path / "config.yaml").write_text(config_text(config))
    options = ["--plugins", "[my_plugin]", "--growth.operator", "repeat", "--logging.interval", "1"]
    options += ["--old_layers.policy", "every_second"]
    finished = subprocess.run(
        [sys.executable, "-m", "megatron_step", "train", "--config", str(tmp_path / "config.yaml"), *options],
        cwd=FOLDER,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "METRICS_URL": f"http://localhost:{server.server_port}/"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert "grown by repeat, identity, which keeps the model's function" in finished.stdout
    assert [line["step"] for line in server.lines] == [1, 2, 3, 4]
    last = json.loads((tmp_path / "run" / "plan.json").read_text())["stages"][-1]["layers"]
    assert [(layer["sources"], layer["born"]) for layer in last] == [([0], 0), ([0], 1), ([1], 0), ([1], 1)]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in (one for one in metrics if "ranks" in one.get("memory", {})):
        (rank,) = line["memory"]["ranks"]
        assert rank["measured"]["model_state_bytes"] == rank["planned"]["model_state_bytes"]


LAYOUTS: list[dict[str, Any]] = [SP, PP2, {}]


@pytest.fixture(scope="module")
def serial(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One process's checkpoint of a grown stage under the policy, and what it computes from there."""
    folder = tmp_path_factory.mktemp("every_second")
    config = _every_second({"distributed_optimizer": False})
    worlds(1).run(write_with_plugin, config=config, folder=folder)
    (result,) = worlds(1).run(train_with_plugin, config=config, folder=folder)
    return folder, result


def _every_second(layout: dict[str, Any]) -> RunConfig:
    model = {"num_layers": 5, "num_query_groups": 2}
    stages = {"count": 2, "layers": [4, 1]}
    return small_config(model=model, stages=stages, parallel=layout, old_layers={"policy": "every_second"})


def test_its_policy_trains_every_second_old_layer(serial: tuple[Path, dict[str, Any]]) -> None:
    trained = {key for key in serial[1]["gradient"] if key.endswith("linear_fc2.weight")}
    # Old layers are 0, 1, 2 and 4; layer 3 is new.
    assert trained == {f"decoder.layers.{layer}.mlp.linear_fc2.weight" for layer in (0, 2, 3, 4)}


@pytest.mark.parametrize("layout", LAYOUTS, ids=["TP2 SP", "PP2", "DP2 distributed"])
def test_its_policy_computes_the_same_in_every_layout_at_the_planned_bytes(
    serial: tuple[Path, dict[str, Any]], worlds: Worlds, layout: dict[str, Any]
) -> None:
    folder, expected = serial
    config = _every_second(layout)
    assert differences(worlds(2).run(train_with_plugin, config=config, folder=folder)[0], expected) == []
    fullest: dict[RankMemory, RankMemory] = {}  # data-parallel ranks differ by the padding in their shards
    for measured, planned in worlds(2).run(bytes_with_plugin, config=config):
        fullest[planned] = max(fullest.get(planned, measured), measured, key=lambda memory: memory.model_state_bytes)
    assert all(measured == planned for planned, measured in fullest.items())


# What the ranks run.


def _import_plugin() -> None:
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    import_plugins(["my_plugin"])


def write_with_plugin(config: RunConfig, folder: Path) -> None:
    _import_plugin()
    write_checkpoint(config, folder, stage_index=1)


def train_with_plugin(config: RunConfig, folder: Path) -> dict[str, Any]:
    _import_plugin()
    return train(config, folder, stage_index=1)


def bytes_with_plugin(config: RunConfig) -> tuple[RankMemory, RankMemory]:
    """Measured and planned model states of this rank."""
    _import_plugin()
    plan = make_plan(resolve(config, VOCAB_SIZE))
    with parallel_layout(config.parallel, 1) as parallel:
        state = build_state(config, plan, plan.stages[1], plan.stages[1].first_step, VOCAB_SIZE, parallel)
        planned = stage_memory(resolve(config, VOCAB_SIZE, parallel.dp_size), plan.stages[1])[parallel.pp_rank]
        return measure_states(state, planned.activation_bytes), planned
