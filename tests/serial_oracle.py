"""The oracle of parallel training: what one process computes from a checkpoint, every layout must compute."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from small_run import VOCAB_SIZE, gather_gradients, made_up_batch, manifest_facts, whole_tensors

from megatron_step.checkpoint.load import find_checkpoint, load_weights
from megatron_step.checkpoint.save import CheckpointSaver
from megatron_step.checkpoint.states import load_states
from megatron_step.config.run import RunConfig, check_world
from megatron_step.engine.parallel import Parallel, parallel_layout
from megatron_step.model.build import sharded_weights
from megatron_step.plan.old_layers import policy_of
from megatron_step.plan.resolved import resolve
from megatron_step.plan.states import training_recipe
from megatron_step.planner.plan import make_plan
from megatron_step.training.hooks.evaluation import validation_loss
from megatron_step.training.hooks.old_layers import old_layers_hook
from megatron_step.training.stage import StepContext
from megatron_step.training.state import TrainState, build_state
from megatron_step.training.step import forward_backward, microbatch_seeds, train_step

TP2: dict[str, Any] = {"tensor_parallel_size": 2}
SP: dict[str, Any] = {**TP2, "sequence_parallel": True}
PP2: dict[str, Any] = {"pipeline_parallel_size": 2}
VPP2: dict[str, Any] = {**PP2, "virtual_pipeline_size": 2}
FULL: dict[str, Any] = {"recompute": "full"}
SELECTIVE: dict[str, Any] = {"recompute": "selective"}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one, full": (1, FULL),
    "TP2": (2, TP2),
    "TP2, full": (2, {**TP2, **FULL}),
    "TP2 SP": (2, SP),
    "TP2 SP, full": (2, {**SP, **FULL}),
    "TP2 SP, selective": (2, {**SP, **SELECTIVE}),
    "PP2": (2, PP2),
    "PP2, full": (2, {**PP2, **FULL}),
    "PP2 VPP2": (2, VPP2),
    "PP2 VPP2, full": (2, {**VPP2, **FULL}),
    "DP2": (2, {"distributed_optimizer": False}),
    "DP2 distributed": (2, {}),
    "DP2 distributed, full": (2, FULL),
    "DP2 overlap": (2, {"overlap_grad_reduce": True}),
    "TP2 PP2": (4, {**TP2, **PP2}),
    "PP4": (4, {"pipeline_parallel_size": 4}),
    "TP2 PP2 DP2": (8, {**TP2, **PP2}),
    "TP2 PP2 DP2 SP, full": (8, {**SP, **PP2, **FULL}),
}
"""World size and section `parallel` of each layout that policies for old layers are tested in."""
"""Parts of layouts, each what differs from the default."""

Fault = Callable[[TrainState], None]
"""Spoils a state, to see that the oracle notices."""


def differences(
    result: dict[str, Any], expected: dict[str, Any], *, bf16_weights: bool = False, coded_momentum: bool = False
) -> list[str]:
    """Every quantity that is further from the serial one than rounding explains, in words.

    With `bf16_weights` a rounding error in a gradient now and then rounds a weight to its other neighbour, 0.4 % away:
    losses still agree to 1e-5, norms of later gradients to 1e-3, and weights to 5e-3. With `coded_momentum` it also
    rounds a code of Muon's 8-bit momentum to its neighbour, and the orthogonal update enlarges the small singular
    values in which that shows: weights agree to 0.1, as in two runs of one process whose gradients differ by 1e-6.
    """
    found = []

    def check(name: str, error: float, tolerance: float) -> None:
        if not error <= tolerance:
            found.append(f"{name}: relative error {error:.1e} above {tolerance:.0e}")

    for what, name in (("losses", "loss"), ("grad_norms", "gradient norm")):
        assert len(result[what]) == len(expected[what])
        for step, (ours, theirs) in enumerate(zip(result[what], expected[what]), start=1):
            check(f"{name} of step {step}", abs(ours / theirs - 1), 1e-3 if bf16_weights and what != "losses" else 1e-5)
    check("validation loss", abs(result["validation_loss"] / expected["validation_loss"] - 1), 1e-5)
    for what, tolerance in (("gradient", 1e-5), ("weight", 0.1 if coded_momentum else 5e-3 if bf16_weights else 1e-4)):
        assert result[what].keys() == expected[what].keys()
        for key, tensor in expected[what].items():
            size = tensor.norm().clamp(min=1e-12)  # what nothing has touched may be zero
            check(f"{what} {key}", float((result[what][key] - tensor).norm() / size), tolerance)
    return found


# What the ranks run.


Groups = tuple[tuple[int, ...], ...]
"""Turn groups of a stage."""


def write_checkpoint(config: RunConfig, folder: Path, stage_index: int = 0, groups: Groups | None = None) -> None:
    """Train three steps of each turn of a stage, so that Adam's moments and step count matter, and save."""
    with parallel_layout(config.parallel, 1) as parallel:
        state = state_of(config, stage_index, parallel, groups)
        fill_adapters(state)
        change = old_layers_hook(config, parallel)
        for step in range(3 * (policy_of(config).num_turns(state.stage, config) if stage_index else 1)):
            train_step(state, made_up_batch(config, 1000 + step, parallel), 1e-3, config, parallel, False)
            change(StepContext(state, {}, None, False))
        saver = CheckpointSaver(folder, config.checkpoint, parallel)
        facts = manifest_facts(config, stage_index)
        saver.save(state.chunks, state.optimizer, training_recipe(config), state.step, facts)


def train(
    config: RunConfig,
    folder: Path,
    stage_index: int = 0,
    fault: Fault | None = None,
    groups: Groups | None = None,
) -> dict[str, Any]:
    """The first step's gradients, then ten steps and an evaluation, from the checkpoint in `folder`.

    Old layers change at their interval; `groups` are the stage's turn groups, those of another layout.
    """
    check_world(config, torch.distributed.get_world_size())
    with parallel_layout(config.parallel, 1) as parallel:
        state = state_of(config, stage_index, parallel, groups)
        found = find_checkpoint(folder, "auto", parallel)
        assert found is not None
        load_weights(found.path, state.chunks, parallel)
        recipe, weights = training_recipe(config), sharded_weights(state.chunks, parallel)
        load_states(found.path, state.optimizer, weights, recipe, recipe, parallel)
        if fault is not None:
            fault(state)
        gradient = first_gradient(state, config, parallel)
        change, results = old_layers_hook(config, parallel), []
        for step in range(10):
            batch = made_up_batch(config, step, parallel)
            results.append(train_step(state, batch, 1e-3 * (1 + step % 3), config, parallel, False))
            change(StepContext(state, {}, None, False))
        return {
            "losses": [result.loss for result in results],
            "grad_norms": [result.grad_norm for result in results],
            "gradient": gradient,
            "weight": whole_tensors(state, parallel, lambda weight: weight.detach()),
            "validation_loss": validation_loss(
                state.chunks, lambda index: made_up_batch(config, 500 + index, parallel), config, parallel
            ),
        }


def state_of(config: RunConfig, stage_index: int, parallel: Parallel, groups: Groups | None = None) -> TrainState:
    """A stage's model with initial weights, at the stage's first step; `groups` replace the stage's turn groups."""
    plan = make_plan(resolve(config, VOCAB_SIZE))
    stage = plan.stages[stage_index]
    if groups is not None:
        stage = replace(stage, turn_groups=groups)
        plan = replace(plan, stages=(*plan.stages[:stage_index], stage, *plan.stages[stage_index + 1 :]))
    return build_state(config, plan, stage, stage.first_step, VOCAB_SIZE, parallel)


def fill_adapters(state: TrainState) -> None:
    """Give adapters and biases of a state of one process values that are not zero, so that all of them matters."""
    generator = torch.Generator().manual_seed(7)
    for chunk in state.chunks:
        for name, param in chunk.named_parameters():
            if name.endswith(("adapter.linear_out.weight", ".bias")):
                param.data.copy_(0.05 * torch.randn(param.shape, generator=generator))


def first_gradient(state: TrainState, config: RunConfig, parallel: Parallel) -> dict[str, torch.Tensor] | None:
    """The gradient of every trained weight, whole, by its key."""
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    batch = made_up_batch(config, 0, parallel)
    seeds = microbatch_seeds(config.training.seed, state.step, len(batch), parallel)
    forward_backward(state.chunks, batch, config, forward_only=False, seeds=seeds)
    gather_gradients(state, parallel)
    return whole_tensors(state, parallel, lambda weight: weight.main_grad, trained_only=True)
