"""A trainable weight that gets no gradient stops the run; a part of one that gets none does not."""

import pytest
import torch
from serial_oracle import state_of
from small_run import VOCAB_SIZE, made_up_batch, small_config

from megatron_step.engine.parallel import Parallel, parallel_layout
from megatron_step.plan.resolved import resolve
from megatron_step.planner.plan import make_plan
from megatron_step.training.hooks.gradients import (
    CHECKED_STEPS,
    NoGradientError,
    gradient_check_hook,
    weights_without_gradient,
)
from megatron_step.training.hooks.rotate import rotate
from megatron_step.training.stage import Hook, StepContext
from megatron_step.training.state import TrainState, build_state, initial_state
from megatron_step.training.step import train_step


def fresh_state(parallel: Parallel, detach: bool = False, **model: int) -> TrainState:
    config = small_config(model=model or None, parallel={"tensor_parallel_size": parallel.config.tensor_parallel_size})
    state = initial_state(config, VOCAB_SIZE, parallel)
    if detach:
        break_graph(state)
    return state


def break_graph(state: TrainState, layer: int = 1) -> None:
    mlp = state.chunks[0].module.decoder.layers[layer].mlp
    mlp.register_forward_hook(lambda module, inputs, output: (output[0].detach(), output[1]))


def train(state: TrainState, parallel: Parallel, steps: int = 1, hook: Hook | None = None) -> TrainState:
    config = small_config(parallel={"tensor_parallel_size": parallel.config.tensor_parallel_size})
    for _ in range(steps):
        train_step(state, made_up_batch(config, state.step, parallel), 1e-3, config, parallel, stop_requested=False)
        if hook is not None:
            hook(StepContext(state, {}, None, False))
    return state


def test_a_whole_graph_reaches_every_weight(alone: Parallel) -> None:
    state = train(fresh_state(alone), alone)
    assert weights_without_gradient(state, alone) == []
    train(state, alone, CHECKED_STEPS + 1, gradient_check_hook(alone))


def test_a_broken_graph_is_named_after_the_checked_steps(alone: Parallel) -> None:
    state, hook = fresh_state(alone, detach=True), gradient_check_hook(alone)
    train(state, alone, CHECKED_STEPS - 1, hook)
    words = r"no gradient in the 3 steps up to step 3: .*decoder\.layers\.1\.mlp\.linear_fc1\.weight, .*The run stops"
    with pytest.raises(NoGradientError, match=words):
        train(state, alone, 1, hook)


def test_layers_that_a_turn_begins_to_train_are_checked_too(alone: Parallel) -> None:
    rotation = {"policy": "rotate", "turn_steps": 4}
    config = small_config(stages={"count": 2, "layers": [3, 1], "steps": 12}, old_layers=rotation)
    state, hook = state_of(config, 1, alone), gradient_check_hook(alone)
    rests = [number for number in (0, 1, 3) if not _fc2(state, number).requires_grad]
    for step in range(4):
        train_step(state, made_up_batch(config, step, alone), 1e-3, config, alone, stop_requested=False)
        hook(StepContext(state, {}, None, False))
    rotate(state, config, alone)
    break_graph(state, rests[0])
    with pytest.raises(NoGradientError, match=rf"up to step 16: decoder\.layers\.{rests[0]}\.mlp\.linear_fc1\.layer"):
        for step in range(CHECKED_STEPS):
            train_step(state, made_up_batch(config, step, alone), 1e-3, config, alone, stop_requested=False)
            hook(StepContext(state, {}, None, False))


def _fc2(state: TrainState, layer: int) -> torch.nn.Parameter:
    return state.chunks[0].module.decoder.layers[layer].mlp.linear_fc2.weight


def test_a_graph_broken_later_is_not_looked_at(alone: Parallel) -> None:
    state, hook = fresh_state(alone), gradient_check_hook(alone)
    train(state, alone, 1, hook)
    break_graph(state)
    train(state, alone, CHECKED_STEPS + 1, hook)
    assert weights_without_gradient(state, alone), "they have no gradient, and nothing was raised"


def test_a_fresh_adapters_a_gets_its_gradient_from_the_second_step_on(alone: Parallel) -> None:
    state, hook = second_stage(alone), gradient_check_hook(alone)
    train(state, alone, 1, hook)
    zero = weights_without_gradient(state, alone)
    assert len(zero) == 3 * 4
    assert all(key.endswith(".adapter.linear_in.weight") for key in zero)
    train(state, alone, CHECKED_STEPS, hook)
    assert weights_without_gradient(state, alone) == []


def test_a_gradient_in_one_of_the_checked_steps_is_enough(alone: Parallel) -> None:
    state, hook = second_stage(alone), gradient_check_hook(alone)
    train(state, alone, 1, hook)
    break_graph(state, layer=2)  # the new one: it has had its gradient, the adapters' A are still to get theirs
    train(state, alone, CHECKED_STEPS, hook)
    assert "decoder.layers.2.mlp.linear_fc1.weight" in weights_without_gradient(state, alone)


def test_every_stage_is_looked_at_anew(alone: Parallel) -> None:
    hook = gradient_check_hook(alone)
    train(fresh_state(alone), alone, CHECKED_STEPS, hook)
    state = second_stage(alone)
    break_graph(state)
    with pytest.raises(NoGradientError, match=r"decoder\.layers\.1\.mlp\.linear_fc1\.adapter\.linear_in\.weight"):
        train(state, alone, CHECKED_STEPS, hook)


def second_stage(parallel: Parallel) -> TrainState:
    """Three old layers with adapters, and a new one."""
    config = small_config(stages={"count": 2, "layers": [3, 1]})
    plan = make_plan(resolve(config, VOCAB_SIZE))
    return build_state(config, plan, plan.stages[1], plan.stages[1].first_step, VOCAB_SIZE, parallel)


def padding_only_on_the_last_rank() -> list[str]:
    config = small_config(parallel={"tensor_parallel_size": 2}, model={"vocab_size_multiple": 512})
    with parallel_layout(config.parallel, seed=1) as parallel:
        # Rows 256 to 511 are padding, all on rank 1.
        return weights_without_gradient(train(fresh_state(parallel, vocab_size_multiple=512), parallel), parallel)


def test_a_rank_with_nothing_but_padding_is_no_problem(worlds) -> None:
    assert worlds(2).run(padding_only_on_the_last_rank) == [[], []]
