"""The loop trains to the end or to a request, calling every hook after every step."""

from collections.abc import Iterator

import pytest
from small_run import VOCAB_SIZE, made_up_batch, small_config

from megatron_step.config.run import RampUpConfig, RunConfig, batch_size_at, consumed_samples
from megatron_step.engine.parallel import Parallel
from megatron_step.optim.schedule import learning_rate
from megatron_step.training.signals import StopRequest
from megatron_step.training.stage import StepContext, train_stage
from megatron_step.training.state import initial_state
from megatron_step.training.step import Microbatch


def _batches(config: RunConfig, parallel: Parallel, first: int = 0) -> Iterator[list[Microbatch]]:
    for step in range(first, config.stages.steps):
        size = batch_size_at(config.training, consumed_samples(config.training, step))
        yield made_up_batch(config, step, parallel, size)


def test_every_step_has_its_line(alone: Parallel) -> None:
    config = small_config(steps=4, training={"micro_batch_size": 1, "ramp_up": RampUpConfig(4, 2, 10)})
    state = initial_state(config, VOCAB_SIZE, alone)
    seen: list[StepContext] = []
    assert train_stage(state, _batches(config, alone), config, alone, [seen.append], StopRequest())
    assert [context.metrics["step"] for context in seen] == [1, 2, 3, 4]
    assert [context.metrics["tokens"] for context in seen] == [32 * samples for samples in (4, 8, 14, 22)]
    assert [context.is_last for context in seen] == [False, False, False, True]
    assert [context.memory is not None for context in seen] == [False, True, False, False]
    rates = [learning_rate(config.schedule, config.optimizer.learning_rate, step, 4) for step in range(4)]
    assert [context.metrics["learning_rate"] for context in seen] == rates
    assert all(context.metrics["tokens_per_second"] > 0 for context in seen)


def test_a_request_ends_it_after_the_step_in_progress(alone: Parallel) -> None:
    config = small_config(steps=10)
    state = initial_state(config, VOCAB_SIZE, alone)
    stop, last = StopRequest(), []

    def hook(context: StepContext) -> None:
        last.append(context.is_last)
        if context.state.step == 2:
            stop.signal_name = "SIGTERM"

    assert not train_stage(state, _batches(config, alone), config, alone, [hook], stop)
    assert last == [False, False, True]
    assert state.step == 3


def test_hooks_run_in_their_order_on_one_line(alone: Parallel) -> None:
    config = small_config(steps=1)
    state = initial_state(config, VOCAB_SIZE, alone)
    lines = []
    hooks = [lambda context: context.metrics.update(added=1), lambda context: lines.append(dict(context.metrics))]
    train_stage(state, _batches(config, alone), config, alone, hooks, StopRequest())
    assert lines[0]["added"] == 1
    assert lines[0]["stage_index"] == 0


def test_nothing_is_left_to_do_at_the_end(alone: Parallel) -> None:
    config = small_config(steps=3)
    state = initial_state(config, VOCAB_SIZE, alone)
    state.step = 3
    hooks = [lambda context: pytest.fail("there is no step left")]
    assert train_stage(state, _batches(config, alone, 3), config, alone, hooks, StopRequest())
