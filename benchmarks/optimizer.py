"""Time of an optimizer step by every recipe of states and both rules, relative to torch's fused AdamW in fp32."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.configs import MODEL, run_config
from benchmarks.timing import Row, interleave, spread
from benchmarks.world import in_world
from megatron_step.config.model import ModelConfig
from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel, parallel_layout
from megatron_step.model.build import sharded_weights
from megatron_step.optim.optimizer import set_learning_rate
from megatron_step.training.state import TrainState, initial_state

ADAMW: tuple[dict[str, Any], ...] = (
    {"states": "full"},
    {"states": "exact"},
    {"states": "compact"},
    {"states": "compact", "correction_bits": 8},
    {"states": "smallest"},
)
"""Keys of the section `optimizer` of each arm of AdamW."""
MUON: tuple[dict[str, Any], ...] = ({"states": "full", "rule": "muon"}, {"states": "compact", "rule": "muon"})
"""The same for Muon."""
_TORCH = "torch fused AdamW, fp32"


def run(repeats: int, model: ModelConfig = MODEL) -> list[Row]:
    """Return a row for each arm: its time relative to torch's fused AdamW on as many fp32 weights, gradients, moments.

    Each arm is the optimizer of a whole model on one rank, with one thread. Muon's arms have a second table, with a
    quarter of the repeats.
    """
    (rows,) = in_world(1, _measure, model, repeats)
    return rows


def _measure(model: ModelConfig, repeats: int) -> list[Row]:
    rows: list[Row] = []
    for rule, recipes, turns in (("AdamW", ADAMW, repeats), ("Muon", MUON, max(1, repeats // 4))):
        configs = {_name(recipe): _config(model, recipe) for recipe in recipes}
        with parallel_layout(run_config(model, 1, "bf16").parallel, seed=1) as parallel:
            states = {name: _with_gradients(config, parallel) for name, config in configs.items()}
            arms = {_TORCH: _torch_step(states[_name(recipes[0])]), **{name: _step(states[name]) for name in states}}
            seconds = interleave(arms, turns)
        rows += [
            {
                "benchmark": f"optimizer step of {rule}, {model.num_layers} layers of width {model.hidden_size}",
                "arm": name,
                **spread([own / base for own, base in zip(seconds[name], seconds[_TORCH])], "over_torch"),
                "milliseconds": spread([1e3 * value for value in seconds[name]], "median")["median"],
            }
            for name in arms
        ]
    return rows


def _name(recipe: dict[str, Any]) -> str:
    return " ".join([recipe["states"], *(f"{key} {recipe[key]}" for key in recipe if key != "states")])


def _config(model: ModelConfig, recipe: dict[str, Any]) -> RunConfig:
    config = run_config(model, 1, "bf16")
    return replace(config, optimizer=replace(config.optimizer, **recipe))


def _with_gradients(config: RunConfig, parallel: Parallel) -> TrainState:
    """Build a state whose gradients are random numbers, ready for the optimizer's step."""
    assert config.model.vocab_size is not None
    state = initial_state(config, config.model.vocab_size, parallel)
    generator = torch.Generator().manual_seed(1)
    for shard in sharded_weights(state.chunks, parallel).values():
        shard.data.main_grad.copy_(1e-3 * torch.randn(shard.data.shape, generator=generator))
    assert state.optimizer is not None
    set_learning_rate(state.optimizer, config.optimizer.learning_rate, config.optimizer, {})
    state.optimizer.prepare_grads()
    return state


def _step(state: TrainState) -> Callable[[], object]:
    assert state.optimizer is not None
    return state.optimizer.step_with_ready_grads


def _torch_step(state: TrainState) -> Callable[[], object]:
    """Return a step of torch's AdamW on fp32 copies of the state's weights."""
    weights = [param.detach().float().clone() for chunk in state.chunks for param in chunk.parameters()]
    for weight in weights:
        weight.grad = 1e-3 * torch.randn_like(weight)
    return torch.optim.AdamW(weights, lr=1e-3, fused=True).step
