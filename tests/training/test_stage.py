"""The loop trains to the end or to a request, calling every hook after every step."""

from collections.abc import Iterator

import pytest
from small_run import VOCAB_SIZE, made_up_batch, small_config

from megatron_step.config.run import RampUpConfig, RunConfig, batch_size_at, consumed_samples
from megatron_step.engine.parallel import Parallel
from megatron_step.engine.signals import StopRequest
from megatron_step.plan.resolved import resolve
from megatron_step.plan.stages import StagePlan
from megatron_step.planner.plan import make_plan
from megatron_step.training.stage import StepContext, step_learning_rate, train_stage, warm_shares
from megatron_step.training.state import initial_state
from megatron_step.training.step import Microbatch


def _batches(config: RunConfig, parallel: Parallel, first: int = 0) -> Iterator[list[Microbatch]]:
    for step in range(first, config.stages.steps):
        size = batch_size_at(config.training, consumed_samples(config.training, step))
        yield made_up_batch(config, step, parallel, size)


def _plan(config: RunConfig) -> StagePlan:
    return make_plan(resolve(config, VOCAB_SIZE))


def test_every_step_has_its_line(alone: Parallel) -> None:
    config = small_config(steps=4, training={"micro_batch_size": 1, "ramp_up": RampUpConfig(4, 2, 10)})
    state = initial_state(config, VOCAB_SIZE, alone)
    seen: list[StepContext] = []
    assert train_stage(state, _plan(config), _batches(config, alone), config, alone, [seen.append], StopRequest())
    assert [context.metrics["step"] for context in seen] == [1, 2, 3, 4]
    assert [context.metrics["tokens"] for context in seen] == [32 * samples for samples in (4, 8, 14, 22)]
    assert [context.is_last for context in seen] == [False, False, False, True]
    assert [context.memory is not None for context in seen] == [False, True, False, False]
    rates = [step_learning_rate(config, _plan(config), step) for step in range(4)]
    assert rates[2] == config.optimizer.learning_rate, "the warm-up takes three steps"
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

    assert not train_stage(state, _plan(config), _batches(config, alone), config, alone, [hook], stop)
    assert last == [False, False, True]
    assert state.step == 3


def test_hooks_run_in_their_order_on_one_line(alone: Parallel) -> None:
    config = small_config(steps=1)
    state = initial_state(config, VOCAB_SIZE, alone)
    lines = []
    hooks = [lambda context: context.metrics.update(added=1), lambda context: lines.append(dict(context.metrics))]
    train_stage(state, _plan(config), _batches(config, alone), config, alone, hooks, StopRequest())
    assert lines[0]["added"] == 1
    assert lines[0]["stage_index"] == 0


def test_nothing_is_left_to_do_at_the_end(alone: Parallel) -> None:
    config = small_config(steps=3)
    state = initial_state(config, VOCAB_SIZE, alone)
    state.step = 3
    hooks = [lambda context: pytest.fail("there is no step left")]
    assert train_stage(state, _plan(config), _batches(config, alone, 3), config, alone, hooks, StopRequest())


def _rates(**sections: dict) -> list[list[float]]:
    """Learning rates of the steps of two stages laid out for 20 steps each, of which the first trains 15."""
    config = small_config(**{**sections, "stages": {"count": 2, "layers": [3, 1], "steps": 20, **sections["stages"]}})
    plan = _plan(config)
    assert [(stage.first_step, stage.last_step) for stage in plan.stages] == [(0, 15), (15, 35)]
    return [
        [step_learning_rate(config, plan, step) for step in range(stage.first_step, stage.last_step)]
        for stage in plan.stages
    ]


def test_each_stage_has_its_schedule() -> None:
    first, second = _rates(stages={})
    # Three steps of warm-up, later two of re-warm-up; only the last stage comes to the decay, 4 of its 20 steps.
    assert first == pytest.approx([2e-3 / 3, 4e-3 / 3] + [2e-3] * 13)
    assert second == pytest.approx([1e-3] + [2e-3] * 16 + [1.5e-3, 1e-3, 0.5e-3])


def test_each_stage_has_its_peak() -> None:
    first, second = _rates(stages={"learning_rates": [4e-3, 1e-3]})
    assert max(first) == 4e-3
    assert max(second) == 1e-3


def test_the_rate_warms_up_again_after_each_restart() -> None:
    first, second = _rates(stages={}, adapter={"restart_interval": 8})
    assert first == _rates(stages={})[0], "the first stage has no adapters"
    assert second[7:11] == pytest.approx([2e-3, 1e-3, 2e-3, 2e-3])
    # In the decay: half of what it would be.
    assert second[15:18] == pytest.approx([2e-3, 1e-3, 1.5e-3])


def test_a_run_without_adapters_has_no_restarts() -> None:
    assert _rates(stages={}, adapter={"restart_interval": 8, "rank": 0}) == _rates(stages={}, adapter={"rank": 0})


def test_a_schedule_over_the_run_decays_over_its_end_alone() -> None:
    schedule = {"scope": "run", "warmup_steps": 5, "rewarm_steps": 4, "decay_fraction": 0.4}
    first, second = _rates(stages={}, schedule=schedule)
    decay = [2e-3 * (1 - done / 14) for done in range(1, 14)]
    assert first + second == pytest.approx([2e-3 * step / 5 for step in range(1, 6)] + [2e-3] * 17 + decay)


def test_after_growth_only_new_weights_warm_up_in_a_schedule_over_the_run() -> None:
    schedule = {"scope": "run", "rewarm_steps": 4}
    stages = {"count": 2, "layers": [3, 1], "steps": 20}
    config = small_config(schedule=schedule, stages=stages, adapter={"restart_interval": 6})
    plan = _plan(config)
    shares = [warm_shares(config, plan, step) for step in range(14, 26)]
    assert shares[0] == {}, "the first stage has no new layers"
    assert [each["new_layer"] for each in shares[1:]] == [0.25, 0.5, 0.75] + [1.0] * 8
    assert [each["adapter"] for each in shares[1:]] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    by_stage = small_config(stages=stages)
    assert warm_shares(by_stage, _plan(by_stage), 15) == {}


def test_a_request_in_the_last_step_before_growth_leaves_growth_to_the_next_process(alone: Parallel) -> None:
    for stages, finished in (({"count": 2, "layers": [2, 2]}, False), ({}, True)):
        config = small_config(steps=2, stages={**stages, "grow_at": 1.0})
        state, stop = initial_state(config, VOCAB_SIZE, alone), StopRequest()

        def hook(context: StepContext, stop: StopRequest = stop) -> None:
            stop.signal_name = "SIGTERM"

        batches = _batches(config, alone)
        assert train_stage(state, _plan(config), batches, config, alone, [hook], stop) is finished
        assert state.step == 2
