"""Model states of a large model by every recipe that trains, measured and planned, on one rank and on two."""

from dataclasses import replace
from typing import Any

from benchmarks.configs import run_config
from benchmarks.states import MODEL
from benchmarks.timing import Row
from benchmarks.world import in_world
from megatron_step.config.model import ModelConfig
from megatron_step.config.run import RunConfig, TrainingConfig
from megatron_step.engine.parallel import parallel_layout
from megatron_step.plan.resolved import resolve
from megatron_step.planner.costs.memory import RankMemory, stage_memory
from megatron_step.planner.plan import make_plan
from megatron_step.training.memory import measure_states
from megatron_step.training.state import initial_state

RECIPES: tuple[dict[str, Any], ...] = (
    {"states": "full"},
    {"states": "full", "gradients": "bf16"},
    {"states": "exact"},
    {"states": "exact", "gradients": "bf16"},
    {"states": "compact"},
    {"states": "compact", "correction_bits": 8},
    {"states": "smallest"},
    {"states": "full", "rule": "muon"},
    {"states": "exact", "rule": "muon"},
    {"states": "compact", "rule": "muon"},
    {"states": "compact", "correction_bits": 8, "rule": "muon"},
    {"states": "smallest", "rule": "muon"},
)
"""Keys of the section `optimizer`."""


def run(model: ModelConfig = MODEL) -> list[Row]:
    """Return a row for each recipe and number of data-parallel ranks: bytes of a trained weight on the fullest rank."""
    rows = []
    for ranks in (1, 2):
        configs = [_config(model, recipe, ranks) for recipe in RECIPES]
        every_rank = in_world(ranks, _measure, configs)
        for recipe, config, *memories in zip(RECIPES, configs, *every_rank):
            measured = max(memory.model_state_bytes for memory in memories)
            rows.append(_row(config, recipe, ranks, measured))
    return rows


def _row(config: RunConfig, recipe: dict[str, Any], ranks: int, measured: int) -> Row:
    model = config.model
    assert model.vocab_size is not None
    resolved = resolve(config, model.vocab_size, ranks)
    planned = stage_memory(resolved, make_plan(resolved).stages[0])[0].model_state_bytes
    weights = _weights(config, model.vocab_size)
    return {
        "benchmark": f"bytes of a trained weight, {model.num_layers} layers",
        "recipe": " ".join([recipe["states"], *(f"{key} {recipe[key]}" for key in recipe if key != "states")]),
        "ranks": ranks,
        "measured": measured / weights,
        "planned": planned / weights,
        "planned_above_percent": 100 * (planned / measured - 1),
    }


def _config(model: ModelConfig, recipe: dict[str, Any], ranks: int) -> RunConfig:
    config = run_config(model, 1, "bf16")
    training = TrainingConfig(global_batch_size=ranks, micro_batch_size=1, precision="bf16")
    return replace(config, optimizer=replace(config.optimizer, **recipe), training=training)


def _weights(config: RunConfig, vocab_size: int) -> int:
    """Weights of the model: their bytes with nothing else are two each."""
    resolved = resolve(config, vocab_size)
    memory = stage_memory(resolved, make_plan(resolved).stages[0])[0]
    return memory.trained_weight_bytes // 2


def _measure(configs: list[RunConfig]) -> list[RankMemory]:
    """Build the model and its optimizer of each config on this rank, one after another, and measure them."""
    memories = []
    for config in configs:
        assert config.model.vocab_size is not None
        with parallel_layout(config.parallel, seed=1) as parallel:
            state = initial_state(config, config.model.vocab_size, parallel)
            memories.append(measure_states(state, activation_bytes=0))
            state.release()
    return memories
