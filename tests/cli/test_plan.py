"""`megatron-step plan` as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_corpus import REPOSITORY

PAPER = "examples/paper/368m.yaml"
SCALE = "examples/scale/7b.yaml"


def plan(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_step", "plan", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_a_plan_as_table_and_as_json(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    result = plan("--config", PAPER, "--json", str(path), "--ranks")
    assert result.returncode == 0, result.stderr
    assert "proven: no plan has less memory" in result.stdout
    values = json.loads(path.read_text())
    assert [stage["num_layers"] for stage in values["stages"]][-1] == 24
    assert plan("--config", PAPER, "--json", "-").stdout == path.read_text()
    again = plan("--config", PAPER, "--planner.plan", str(path), "--json", "-")
    assert [stage["layout"] for stage in json.loads(again.stdout)["stages"]] == [
        stage["layout"] for stage in values["stages"]
    ]


def test_the_papers_plans() -> None:
    lines = plan("--config", PAPER, "--paper").stdout.splitlines()
    layers = [line.split() for line in lines if " layers " in line]
    assert [line[2] for line in layers[1:]] == ["14+10", "11+8+5", "9+7+5+3"]


def test_a_range_of_numbers_of_stages() -> None:
    peaks = [
        json.loads(plan("--config", SCALE, *arguments, "--json", "-").stdout)["peak_bytes"]
        for arguments in (("--count", "1-3"), ("--stages.count", "2"), ("--stages.count", "3"))
    ]
    assert peaks[0] == min(peaks)


def test_other_engines_are_planned_for() -> None:
    peaks = {}
    for keys in ((), ("attention", "unfused"), ("recipe", "adam8bit_int8_base")):
        overrides = (f"--planner.{keys[0]}", keys[1]) if keys else ()
        result = plan("--config", SCALE, *overrides)
        assert result.returncode == 0 or "does NOT fit" in result.stdout
        assert ("counts it for another engine" in result.stdout) == bool(keys)
        assert not keys or f"planner.{keys[0]} {keys[1]}" in result.stdout
        peaks[keys] = float(result.stdout.partition("\npeak memory ")[2].split()[0])
    assert peaks["recipe", "adam8bit_int8_base"] < peaks[()] < peaks["attention", "unfused"]


def test_what_does_not_fit_is_explained() -> None:
    result = plan("--config", SCALE, "--stages.count", "1")
    assert result.returncode == 1
    assert "does NOT fit" in result.stdout
    result = plan("--config", SCALE, "--stages.count", "1", "--explain")
    assert result.returncode == 1
    assert "stage 1, pipeline rank 0: 0.63 GiB short" in result.stdout
    assert "stages.count 2: peak" in result.stdout


def test_a_sweep_makes_a_figure(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("nodes: [{count: 1, gpus_per_node: 2, memory_gib: 72}]")
    figure = tmp_path / "pareto.png"
    arguments = ("--config", PAPER, "--cluster", str(cluster), "--model.num_layers", "4")
    result = plan(*arguments, "--sweep", str(figure), "--mark", "half=0.5")
    assert result.returncode == 0, result.stderr
    assert "on the Pareto front" in result.stdout
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster", "missing.yaml"], "cannot read the cluster missing.yaml"),
        (["--stages.count", "40"], "stages.count 40 is more than model.num_layers 32"),
        (["--parallel.tensor_parallel_size", "16"], "the cluster has 8 GPUs, fewer than"),
        (["--world-size", "6"], "a world of 6 ranks does not fit"),
        (["--world-size", "0"], "the world size is 0: it must be at least 1"),
        (["--world-size", "16"], "the cluster has 8 GPUs, but tensor x data x pipeline parallel is 4 x 2 x 2 = 16"),
        (["--count", "3"], "--count 3 is not a range"),
        (["--mark", "x", "--sweep"], "--mark x must be a name and a share"),
        (["--clust", "x"], "unknown option --clust"),
        (["--planner.plan", "missing.json"], "cannot read the plan missing.json"),
        (["--model.vocab_size", "null"], "data/tokenizer.model"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    for name in ("7b.yaml", "8x_16gb.yaml"):
        text = (REPOSITORY / "examples/scale" / name).read_text().replace("examples/scale/", "")
        (tmp_path / name).write_text(text)
    result = plan("--config", "7b.yaml", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"7b.yaml", "8x_16gb.yaml"}


@pytest.mark.parametrize("name", ["368m", "680m", "1.2b"])
def test_configs_of_the_paper_are_planned(name: str) -> None:
    result = plan("--config", f"examples/paper/{name}.yaml", "--json", "-")
    assert json.loads(result.stdout)["status"] == "optimal"


@pytest.mark.parametrize("name", ["7b", "70b", "70b_mixed", "405b"])
def test_configs_of_large_models_are_planned(name: str) -> None:
    """Plans for 8 to 16,384 GPUs, one of them with two kinds of GPU."""
    result = plan("--config", f"examples/scale/{name}.yaml", "--planner.objective", "memory", "--json", "-")
    values = json.loads(result.stdout)
    assert values["status"] == "optimal"
    assert values["reduction"] > 0.25
    assert all(rank["total_bytes"] <= rank["capacity_bytes"] for stage in values["stages"] for rank in stage["ranks"])
