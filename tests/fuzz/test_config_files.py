"""No config, cluster, plan or command line ends in a traceback."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from damage import ODD_VALUES, check_survives, damaged_bytes, damaged_tree, doubled_line, examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_run import small_config

from megatron_step.config.load import config_from_text, config_text, load_cluster, load_config
from megatron_step.config.run import RunConfig, check_world
from megatron_step.config.sections import dotted_names
from megatron_step.plan.resolved import resolve
from megatron_step.planner.forecast import with_plan
from megatron_step.planner.lengths import length_warnings
from megatron_step.planner.plan import make_plan

_CONFIG = yaml.safe_load(config_text(small_config(stages={"count": 2, "layers": [2, 2]})))
_TEXT = yaml.safe_dump(_CONFIG, sort_keys=False)
_CLUSTER = {"teraflops": 400, "nodes": [{"count": 2, "gpus_per_node": 8, "memory_gib": 72.5, "relative_speed": 0.5}]}
_PLAN = make_plan(resolve(small_config(stages={"count": 2, "layers": [2, 2]}), 250)).to_dict()
_LARGEST_PLANNED = 100


def _yaml(values: Any) -> bytes:
    return yaml.safe_dump(values, sort_keys=False).encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def _check_config(path: Path, content: bytes, options: Sequence[str] = ()) -> None:
    path.write_bytes(content)
    config = check_survives(lambda: load_config(["--config", str(path), *options]))
    if config is not None:
        assert config_from_text(config_text(config)) == config, "what is written is read back"
        check_survives(lambda: check_world(config, 8))
        check_survives(lambda: _plan(config))


def _plan(config: RunConfig) -> None:
    """The arithmetic that follows from a config, for one whose plan takes no search and no time."""
    stages = config.stages
    budgets = [stages.steps, stages.tokens]
    numbers = [number for value in budgets for number in (value if isinstance(value, list) else [value]) if number]
    is_small = max([*numbers, config.model.num_layers, stages.count]) <= _LARGEST_PLANNED
    is_given = isinstance(stages.layers, list) or stages.count == 1
    if is_small and is_given and config.parallel.model_parallel_size == 1:
        length_warnings(config, make_plan(resolve(config, 250)))


_SETTINGS: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=examples(350), **_SETTINGS)
@given(values=damaged_tree(_CONFIG))
def test_values_of_other_types_and_missing_keys(folder: Path, values: Any) -> None:
    _check_config(folder / "config.yaml", _yaml(values))


@settings(max_examples=examples(150), **_SETTINGS)
@given(content=doubled_line(_TEXT).map(str.encode) | damaged_bytes(_TEXT.encode(), [b"\xff\xfea\0", b"[1, 2]", b"\0"]))
def test_doubled_keys_and_damaged_files(folder: Path, content: bytes) -> None:
    _check_config(folder / "config.yaml", content)


@settings(max_examples=examples(150), **_SETTINGS)
@given(
    options=st.lists(
        st.tuples(st.sampled_from(list(dotted_names(RunConfig))), ODD_VALUES, st.booleans()), min_size=1, max_size=3
    )
)
def test_options_of_the_command_line(folder: Path, options: list[tuple[str, Any, bool]]) -> None:
    arguments = []
    for name, value, in_one in options:
        text = value if isinstance(value, str) else json.dumps(value)
        arguments += [f"--{name}={text}"] if in_one else [f"--{name}", text]
    _check_config(folder / "config.yaml", _TEXT.encode(), arguments)


@settings(max_examples=examples(150), **_SETTINGS)
@given(content=damaged_tree(_CLUSTER).map(_yaml) | damaged_bytes(yaml.safe_dump(_CLUSTER).encode()))
def test_clusters(folder: Path, content: bytes) -> None:
    (folder / "cluster.yaml").write_bytes(content)
    check_survives(lambda: load_cluster(folder / "cluster.yaml").num_gpus)


@settings(max_examples=examples(150), **_SETTINGS)
@given(
    content=damaged_tree(_PLAN).map(lambda values: json.dumps(values).encode())
    | damaged_bytes(json.dumps(_PLAN).encode())
)
def test_plans(folder: Path, content: bytes) -> None:
    (folder / "plan.json").write_bytes(content)
    config = small_config(stages={"count": 2})

    def read() -> None:
        planned = with_plan(config, folder / "plan.json")
        make_plan(resolve(planned, 250))

    check_survives(read)
