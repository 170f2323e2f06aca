"""A step reports the loss before its update, clips, and leaves the weights alone where a number is not finite."""

import math

import pytest
import torch
from small_run import VOCAB_SIZE, made_up_batch, small_config

from megatron_step.engine.parallel import Parallel
from megatron_step.training.state import TrainState, initial_state
from megatron_step.training.step import NonFiniteError, evaluate_batch, train_step


def _weights(state: TrainState) -> list[torch.Tensor]:
    return [param.detach().clone() for param in state.chunks[0].parameters()]


def test_the_loss_is_that_of_the_whole_batch_before_the_update(alone: Parallel) -> None:
    config = small_config()
    state = initial_state(config, VOCAB_SIZE, alone)
    batch = made_up_batch(config, 0, alone)
    before = evaluate_batch(state.chunks, batch, config, alone)
    result = train_step(state, batch, 1e-2, config, alone, stop_requested=False)
    assert result.loss == pytest.approx(before, rel=1e-6)
    assert result.loss == pytest.approx(math.log(VOCAB_SIZE), rel=0.05), "an untrained model knows nothing"
    assert state.step == 1
    assert evaluate_batch(state.chunks, batch, config, alone) < before
    assert not result.stop


def test_micro_batches_of_any_size_give_the_same_step(alone: Parallel) -> None:
    results, weights = [], []
    for size in (1, 8):
        config = small_config(training={"micro_batch_size": size})
        state = initial_state(config, VOCAB_SIZE, alone)
        results.append(train_step(state, made_up_batch(config, 0, alone), 1e-2, config, alone, False))
        weights.append(_weights(state))
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-4)
    for one, other in zip(*weights):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_the_gradient_is_clipped_and_its_norm_reported_before(alone: Parallel) -> None:
    config = small_config()
    state = initial_state(config, VOCAB_SIZE, alone)
    result = train_step(state, made_up_batch(config, 0, alone), 1e-2, config, alone, False)
    gradients = torch.cat([param.main_grad.flatten() for param in state.chunks[0].parameters()])
    expected = min(1.0, result.grad_norm)
    assert result.grad_norm > 0
    assert float(gradients.norm()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(alone: Parallel, value: float) -> None:
    config = small_config()
    state = initial_state(config, VOCAB_SIZE, alone)
    with torch.no_grad():
        state.chunks[0].module.decoder.final_layernorm.weight.fill_(value)
    before = _weights(state)
    with pytest.raises(NonFiniteError, match="the loss of step 1 is .* the run stops before the update"):
        train_step(state, made_up_batch(config, 0, alone), 1e-2, config, alone, False)
    assert all(torch.equal(one, other) or one.isnan().any() for one, other in zip(before, _weights(state)))
    assert state.step == 0


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(alone: Parallel) -> None:
    config = small_config()
    state = initial_state(config, VOCAB_SIZE, alone)
    norm = state.chunks[0].module.decoder.final_layernorm
    norm.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * float("inf"),))
    before = _weights(state)
    with pytest.raises(NonFiniteError, match="the gradient norm of step 1"):
        train_step(state, made_up_batch(config, 0, alone), 1e-2, config, alone, False)
    assert all(torch.equal(one, other) for one, other in zip(before, _weights(state)))


def test_a_request_to_stop_comes_back(alone: Parallel) -> None:
    config = small_config()
    state = initial_state(config, VOCAB_SIZE, alone)
    assert train_step(state, made_up_batch(config, 0, alone), 1e-2, config, alone, stop_requested=True).stop
