"""A stage's state has its model, an optimizer over what it trains, and counts of the updates that moments have seen."""

from typing import Any

import pytest
import torch
from serial_oracle import fill_adapters, first_gradient
from small_run import PLAIN, TIED, VOCAB_SIZE, small_config

from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel
from megatron_step.plan.resolved import resolve
from megatron_step.planner.plan import make_plan
from megatron_step.training.state import TrainState, build_stage_model, build_state, initial_state, make_trainable

STAGES: dict[str, Any] = {"count": 3, "layers": [2, 1, 1], "steps": [8, 12, 10]}


def _state(config: RunConfig, index: int, parallel: Parallel, in_stage: int = 0) -> TrainState:
    plan = make_plan(resolve(config, VOCAB_SIZE))
    stage = plan.stages[index]
    return build_state(config, plan, stage, stage.first_step + in_stage, VOCAB_SIZE, parallel)


def _optimized(state: TrainState) -> int:
    return sum(param.numel() for group in state.optimizer.param_groups for param in group["params"])


def test_a_fresh_state(alone: Parallel) -> None:
    state = initial_state(small_config(), VOCAB_SIZE, alone)
    assert state.step == 0
    assert state.stage.index == 0
    (chunk,) = state.chunks
    assert all(param.requires_grad for param in chunk.parameters())
    assert _optimized(state) == sum(param.numel() for param in chunk.parameters())


def test_bf16_weights_have_fp32_gradients(alone: Parallel) -> None:
    state = initial_state(small_config(training={"precision": "bf16"}), VOCAB_SIZE, alone)
    assert {param.dtype for param in state.chunks[0].parameters()} == {torch.bfloat16}
    assert {buffer.grad_data.dtype for buffer in state.chunks[0].buffers} == {torch.float32}


@pytest.mark.parametrize("model", [PLAIN, TIED], ids=["untied", "tied"])
def test_bf16_weights_get_the_gradients_of_the_same_weights_in_fp32(alone: Parallel, model: dict[str, Any]) -> None:
    """Every kind of weight, over several micro-batches: gradients are rounded nowhere on their way to the buffer."""
    gradients = []
    for precision in ("fp32", "bf16_weights"):
        config = small_config(model=model, stages=STAGES, adapter={"dropout": 0.1}, training={"precision": precision})
        state = _state(config, 1, alone)
        fill_adapters(state)
        for param in state.chunks[0].parameters():
            param.data.copy_(param.bfloat16())
        gradients.append(first_gradient(state, config, alone))
    assert state.chunks[0].module.embedding.word_embeddings.weight.dtype == torch.bfloat16
    for key, expected in gradients[0].items():
        error = (gradients[1][key] - expected).norm() / expected.norm()
        assert error < 1e-6, f"{key}: relative error {error:.1e}"


def test_a_later_stage_optimizes_what_it_trains_alone(alone: Parallel) -> None:
    state = _state(small_config(stages=STAGES), 1, alone)
    (chunk,) = state.chunks
    assert len(chunk.module.decoder.layers) == 3
    frozen = [name for name, param in chunk.named_parameters() if not param.requires_grad]
    assert len(frozen) == 2 * 4, "the four matrices of both old layers"
    trained = sum(param.numel() for param in chunk.parameters() if param.requires_grad)
    assert _optimized(state) == trained < sum(param.numel() for param in chunk.parameters())


@pytest.mark.parametrize("at_stage_end", ["merge", "keep"])
def test_groups_count_the_steps_since_their_moments_began(alone: Parallel, at_stage_end: str) -> None:
    # Stages 0 and 1 end after 6 and 9 steps, three quarters of theirs.
    config = small_config(stages=STAGES, adapter={"at_stage_end": at_stage_end})
    state = _state(config, 2, alone, in_stage=4)
    assert state.step == 6 + 9 + 4
    counts = {
        (group["role"], int(group["step"]))
        for group in state.optimizer.param_groups
        if group["params"]  # a group without weights of ours is there for other ranks
    }
    adapters = {("adapter", 13), ("adapter", 4)} if at_stage_end == "keep" else {("adapter", 4)}
    assert counts == {("embedding", 19), ("base", 19), ("base", 13), ("new_layer", 4), *adapters}


def test_a_stages_model_takes_its_weights_before_gradients_and_moments_are_allocated(alone: Parallel) -> None:
    config = small_config(stages=STAGES, training={"precision": "bf16"})
    plan = make_plan(resolve(config, VOCAB_SIZE))
    chunks = build_stage_model(config, plan.stages[1], plan.stages[1].first_step, VOCAB_SIZE, alone)
    params = [param for chunk in chunks for param in chunk.parameters()]
    assert any(param.requires_grad for param in params)
    assert not any(hasattr(param, "main_grad") for param in params)
    for param in params:
        param.data.fill_(0.5)
    state = make_trainable(chunks, config, plan, plan.stages[1], plan.stages[1].first_step, alone)
    assert all((param == 0.5).all() for param in state.chunks[0].parameters())
    main = [param for group in state.optimizer.param_groups for param in group["params"]]
    assert all((param == 0.5).all() for param in main), "the fp32 main weights are those that were filled in"


def test_a_released_state_holds_no_weights(alone: Parallel) -> None:
    import weakref

    state = initial_state(small_config(), VOCAB_SIZE, alone)
    weight = weakref.ref(state.chunks[0].module.decoder.layers[0].mlp.linear_fc1.weight)
    buffer = weakref.ref(state.chunks[0].buffers[0].grad_data)
    state.release()
    assert weight() is None
    assert buffer() is None
