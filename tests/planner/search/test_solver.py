"""Plans need no solver where dynamic programming is exact; where one is needed, an error says why it is not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_corpus import REPOSITORY

_WITHOUT_CBC = """
import os
from megatron_step.config.load import load_config
from megatron_step.plan.resolved import resolve
from megatron_step.planner.paper import paper_plan
from megatron_step.planner.plan import make_plan

def config(count, pipeline=1, virtual=1):
    keys = {"stages.count": count, "stages.layers": "auto", "model.num_layers": 14, "stages.steps": 10}
    keys |= {"parallel.pipeline_parallel_size": pipeline, "parallel.virtual_pipeline_size": virtual}
    options = [text for key, value in keys.items() for text in (f"--{key}", str(value))]
    return load_config(["--config", "examples/paper/368m.yaml", *options])

folder = os.getcwd()
print([stage.num_new_layers for stage in make_plan(resolve(config(3), 32000)).stages])
print([stage.layout for stage in make_plan(resolve(config(2, pipeline=2), 32000)).stages])
for planned in (
    lambda: make_plan(resolve(config(2, pipeline=2, virtual=3), 32000)),
    lambda: paper_plan(resolve(config(2), 32000), 2, with_embeddings=True),
):
    try:
        planned()
    except OSError as error:
        print(error)
assert os.getcwd() == folder
"""


@pytest.mark.parametrize("content", [None, "not a library"])
def test_a_machine_without_cbc(tmp_path: Path, content: str | None) -> None:
    library = tmp_path / "libCbc.so"
    if content is not None:
        library.write_text(content)  # as one of another architecture
    result = subprocess.run(
        [sys.executable, "-c", _WITHOUT_CBC],
        env={**os.environ, "PMIP_CBC_LIBRARY": str(library)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    layers, layouts, interleaved, paper = result.stdout.splitlines()
    assert sum(map(int, layers.strip("[]").split(","))) == 14
    assert layouts.count("(") == 2
    for line, purpose in ((interleaved, "layout of virtual pipelines"), (paper, "the paper's program")):
        assert purpose in line
        assert "needs the solver CBC, but its library cannot be loaded: " in line
        assert str(library) in line
