"""A trainable weight that gets no gradient stops the run; a part of one that gets none does not."""

import pytest
from small_run import VOCAB_SIZE, made_up_batch, small_config

from megatron_step.engine.parallel import Parallel, parallel_layout
from megatron_step.training.gradients import NoGradientError, gradient_check_hook, weights_without_gradient
from megatron_step.training.stage import StepContext
from megatron_step.training.state import TrainState, initial_state
from megatron_step.training.step import train_step


def trained_one_step(parallel: Parallel, detach: bool = False, **model: int) -> TrainState:
    config = small_config(model=model or None, parallel={"tensor_parallel_size": parallel.config.tensor_parallel_size})
    state = initial_state(config, VOCAB_SIZE, parallel)
    if detach:
        mlp = state.chunks[0].module.decoder.layers[1].mlp
        mlp.register_forward_hook(lambda module, inputs, output: (output[0].detach(), output[1]))
    train_step(state, made_up_batch(config, 1, parallel), 1e-3, config, parallel, stop_requested=False)
    return state


def test_a_whole_graph_reaches_every_weight(alone: Parallel) -> None:
    state = trained_one_step(alone)
    assert weights_without_gradient(state, alone) == []
    gradient_check_hook(alone)(StepContext(state, {}, None, False))


def test_a_broken_graph_is_named(alone: Parallel) -> None:
    state = trained_one_step(alone, detach=True)
    with pytest.raises(NoGradientError, match=r"decoder\.layers\.1\.mlp\.linear_fc1\.weight"):
        gradient_check_hook(alone)(StepContext(state, {}, None, False))


def test_only_the_first_step_is_looked_at(alone: Parallel) -> None:
    hook = gradient_check_hook(alone)
    hook(StepContext(trained_one_step(alone), {}, None, False))
    hook(StepContext(trained_one_step(alone, detach=True), {}, None, False))  # raises nothing


def padding_only_on_the_last_rank() -> list[str]:
    config = small_config(parallel={"tensor_parallel_size": 2}, model={"vocab_size_multiple": 512})
    with parallel_layout(config.parallel, seed=1) as parallel:
        state = trained_one_step(parallel, vocab_size_multiple=512)  # rows 256 to 511 are padding, all on rank 1
        return weights_without_gradient(state, parallel)


def test_a_rank_with_nothing_but_padding_is_no_problem(worlds) -> None:
    assert worlds(2).run(padding_only_on_the_last_rank) == [[], []]
