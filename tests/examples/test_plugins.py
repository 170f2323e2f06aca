"""The example plugin trains with its operator and posts its metrics, in another process, by the config alone."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from small_corpus import REPOSITORY
from small_run import small_config

from megatron_step.config.data import DataConfig
from megatron_step.config.load import config_text

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
