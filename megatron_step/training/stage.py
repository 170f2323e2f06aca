"""Train one stage: batch, forward and backward, clip, step, hooks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

from megatron_step.config.run import RunConfig, consumed_samples
from megatron_step.engine.parallel import Parallel
from megatron_step.engine.signals import StopRequest
from megatron_step.optim.schedule import learning_rate, rewarm_share
from megatron_step.plan.old_layers import Role, since_change
from megatron_step.plan.stages import StagePlan
from megatron_step.planner.costs.memory import RankMemory
from megatron_step.training.memory import measure_step
from megatron_step.training.state import TrainState
from megatron_step.training.step import Microbatch, train_step
from megatron_step.training.trackers.tracker import Metrics


@dataclass(frozen=True)
class StepContext:
    """The arguments of a hook, which is called after each step."""

    state: TrainState
    """The state after the step."""
    metrics: Metrics
    """The step's line for metrics.jsonl. A hook may add to it; later hooks see the additions."""
    memory: RankMemory | None
    """This rank's memory; None except after the step that was measured."""
    is_last: bool
    """Whether the stage, or the process's training, ends with this step."""

    def is_due(self, interval: int) -> bool:
        """Return whether the step is a multiple of `interval`; always False if `interval` is 0."""
        return interval > 0 and self.state.step % interval == 0


Hook = Callable[[StepContext], None]
"""A function that is called after each step, on every rank. An exception in it ends the run."""


def train_stage(
    state: TrainState,
    plan: StagePlan,
    batches: Iterable[list[Microbatch]],
    config: RunConfig,
    parallel: Parallel,
    hooks: list[Hook],
    stop: StopRequest,
) -> bool:
    """Train from `state.step` to the end of the stage. Return True if the end was reached, False if asked to stop.

    If the run is asked to stop in the last step before growth, the next process grows the model.

    `batches` gives each step's micro-batches, from the sample that the state has reached.
    """
    first_step, last_step = state.step, state.stage.last_step
    for microbatches in batches:
        start = perf_counter()
        rate = step_learning_rate(config, plan, state.step)
        step = partial(
            train_step, state, microbatches, rate, config, parallel, bool(stop), warm_shares(config, plan, state.step)
        )

        # The first step of a stage allocates what stays, so the second is like all later ones.
        measured = state.step == min(first_step + 1, last_step - 1)
        result, memory = measure_step(state, step) if measured else (step(), None)
        seconds = perf_counter() - start
        samples_before, samples_after = (
            consumed_samples(config.training, count) for count in (state.step - 1, state.step)
        )
        metrics = {
            "step": state.step,
            "stage_index": state.stage.index,
            "loss": result.loss,
            "learning_rate": rate,
            "grad_norm": result.grad_norm,
            "tokens": samples_after * config.model.seq_length,
            "tokens_per_second": (samples_after - samples_before) * config.model.seq_length / seconds,
        }
        is_last = result.stop or state.step == last_step
        for hook in hooks:
            hook(StepContext(state, metrics, memory, is_last))
        if is_last:
            return not result.stop or (state.step == last_step and not state.stage.grows)
    return True


def step_learning_rate(config: RunConfig, plan: StagePlan, step: int) -> float:
    """Return the learning rate of the update after `step` finished steps of the run."""
    schedule, stage, rates = config.schedule, plan.stage_at(step), config.stages.learning_rates
    peak = rates[stage.index] if rates is not None else config.optimizer.learning_rate
    if schedule.scope == "run":
        warmup_steps = schedule.warmup_steps
        return learning_rate(schedule, peak, step, plan.num_steps, warmup_steps=warmup_steps, since_restart=step)
    in_stage = step - stage.first_step
    warmup_steps = schedule.rewarm_steps if stage.index > 0 else schedule.warmup_steps
    return learning_rate(
        schedule,
        peak,
        in_stage,
        stage.schedule_steps,
        warmup_steps=warmup_steps,
        since_restart=since_change(step, stage, config),
        grows=stage.grows,
    )


def warm_shares(config: RunConfig, plan: StagePlan, step: int) -> dict[Role, float]:
    """Return the share of the learning rate that new weights have after `step` steps, with schedule.scope `run`.

    New layers warm up since the stage began, adapters since they were drawn. Other weights have the whole rate.
    """
    schedule, stage = config.schedule, plan.stage_at(step)
    if schedule.scope == "stage" or stage.index == 0:
        return {}
    return {
        "new_layer": rewarm_share(schedule, step - stage.first_step),
        "adapter": rewarm_share(schedule, since_change(step, stage, config)),
    }
