"""Trains one stage: batch, forward and backward, clip, step, hooks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from megatron_step.config.run import RunConfig, consumed_samples
from megatron_step.engine.parallel import Parallel
from megatron_step.optim.schedule import learning_rate
from megatron_step.training.memory import Memory, measure_step
from megatron_step.training.signals import StopRequest
from megatron_step.training.state import TrainState
from megatron_step.training.step import Microbatch, train_step

Metrics = dict[str, Any]
"""One line of metrics.jsonl."""


@dataclass(frozen=True)
class StepContext:
    """What a hook is told after each step."""

    state: TrainState
    """The state after the step."""
    metrics: Metrics
    """The step's line in the making; a hook may add to it, in the order of the hooks."""
    memory: Memory | None
    """This rank's memory, on the step on which it was measured."""
    is_last: bool
    """Whether training ends with this step."""


Hook = Callable[[StepContext], None]


def train_stage(
    state: TrainState,
    batches: Iterable[list[Microbatch]],
    config: RunConfig,
    parallel: Parallel,
    hooks: list[Hook],
    stop: StopRequest,
) -> bool:
    """Train from `state.step` to the end of the stage; whether it got there, or was asked to stop.

    `batches` gives each step's micro-batches, from the sample that the state has reached.
    """
    first_step = state.step
    for microbatches in batches:
        start = perf_counter()
        rate = learning_rate(config.schedule, config.optimizer.learning_rate, state.step, config.stages.steps)

        def step(microbatches: list[Microbatch] = microbatches, rate: float = rate) -> Any:
            return train_step(state, microbatches, rate, config, parallel, bool(stop))

        # The second step of a process is like all that follow: by then everything that stays is allocated.
        measured = state.step == min(first_step + 1, config.stages.steps - 1)
        result, memory = measure_step(state, step) if measured else (step(), None)
        seconds = perf_counter() - start
        before, after = (consumed_samples(config.training, count) for count in (state.step - 1, state.step))
        metrics = {
            "step": state.step,
            "stage_index": 0,
            "loss": result.loss,
            "learning_rate": rate,
            "grad_norm": result.grad_norm,
            "tokens": after * config.model.seq_length,
            "tokens_per_second": (after - before) * config.model.seq_length / seconds,
        }
        is_last = result.stop or state.step == config.stages.steps
        for hook in hooks:
            hook(StepContext(state, metrics, memory, is_last))
        if result.stop:
            return state.step == config.stages.steps
    return True
