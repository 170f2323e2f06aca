"""Warnings about lengths that do not fit together, such as a warm-up that is longer than its stage.

Each of these configs is valid, and may be meant: a trial run has few steps. So a run prints the warnings and trains.
"""

from collections.abc import Iterator
from math import lcm

from megatron_step.config.counts import counted
from megatron_step.config.optimization import ScheduleConfig
from megatron_step.config.run import RunConfig, batch_size_at, consumed_samples
from megatron_step.plan.old_layers import policy_of
from megatron_step.plan.stages import Stage, StagePlan


def length_warnings(config: RunConfig, plan: StagePlan) -> list[str]:
    """Return a warning for each length of the run that does not fit; an empty list if all fit."""
    warnings = [*_run_warnings(config, plan), *_sample_warnings(config, plan), *_schedule_warnings(config, plan)]
    for stage in plan.stages:
        if stage.grows:
            warnings += _growth_warnings(config, stage)
        if stage.index and stage.num_steps:
            warnings += _change_warnings(config, stage)
    return list(dict.fromkeys(warnings))


def _schedule_warnings(config: RunConfig, plan: StagePlan) -> Iterator[str]:
    """Compare warm-up and decay with the steps that they must fit into: those of a stage, or of the run."""
    schedule = config.schedule
    if schedule.scope == "run":
        yield from _warm_up_warnings(schedule, plan.num_steps, plan.num_steps, "the run", after_growth=False)
    for stage in plan.stages:
        if stage.num_steps == 0 or (schedule.scope == "run" and stage.index == 0):
            continue
        name, after_growth = f"stage {stage.number}", stage.index > 0
        decaying = 0 if stage.grows or schedule.scope == "run" else stage.schedule_steps
        yield from _warm_up_warnings(schedule, stage.num_steps, decaying, name, after_growth)
    decay = round(schedule.decay_fraction * plan.num_steps)
    last_growth = plan.stages[-1].first_step
    if schedule.scope == "run" and schedule.kind == "wsd" and last_growth > plan.num_steps - decay:
        yield (
            f"the model last grows after step {last_growth}, but the learning rate decays from step "
            f"{plan.num_steps - decay} on (schedule.decay_fraction {schedule.decay_fraction} of the run), and growth "
            "in a decay costs quality. Set schedule.decay_fraction to at most "
            f"{1 - last_growth / plan.num_steps:.2f}, or let the model grow earlier"
        )


def _warm_up_warnings(
    schedule: ScheduleConfig, steps: int, decaying: int, name: str, after_growth: bool
) -> Iterator[str]:
    """Compare warm-up and decay with the `steps` that are trained.

    `decaying` is the number of steps that a decay is a share of; 0 where the schedule does not decay.
    """
    key = "rewarm_steps" if after_growth else "warmup_steps"
    warmup = schedule.rewarm_steps if after_growth else schedule.warmup_steps
    if warmup > steps:
        yield (
            f"schedule.{key} {warmup} is more than the {counted(steps, 'step')} of {name}: the learning rate "
            f"reaches only {steps / warmup:.1%} of its peak. Set schedule.{key} to at most {steps}"
        )
    decay = round(schedule.decay_fraction * decaying)
    decays = schedule.kind == "wsd" and decaying > 0 and schedule.decay_fraction > 0
    if decays and warmup <= steps and decay > decaying - warmup:
        yield (
            f"schedule.{key} {warmup} leaves only {counted(decaying - warmup, 'step')} of {name} for the decay, "
            f"but schedule.decay_fraction {schedule.decay_fraction} asks for {decay} of its {decaying} steps. Set "
            f"schedule.{key} to at most {decaying - decay}"
        )
    if decays and decay == 0:
        yield (
            f"schedule.decay_fraction {schedule.decay_fraction} of the {counted(decaying, 'step')} of {name} is "
            "less than a step: the learning rate does not decay"
        )


def _growth_warnings(config: RunConfig, stage: Stage) -> Iterator[str]:
    """Compare the time of growth with the stage's steps."""
    time, budget = config.stages.growth_times[stage.index], stage.schedule_steps
    if budget and time * budget < 1:
        yield (
            f"stages.grow_at {time} of the {counted(budget, 'step')} of stage {stage.number} is less than "
            "a step: the model grows after one step"
        )


def _change_warnings(config: RunConfig, stage: Stage) -> Iterator[str]:
    """Compare the interval between changes of old layers with the stage's steps and with the re-warm-up."""
    policy, rewarm = policy_of(config), config.schedule.rewarm_steps
    interval, key = policy.change_interval(config), policy.interval_key
    if interval >= stage.num_steps:
        yield (
            f"{key} {interval} is not less than the {counted(stage.num_steps, 'step')} of stage {stage.number}: the "
            "old layers do not change in that stage"
        )
    elif 0 < interval < rewarm:
        yield (
            f"schedule.rewarm_steps {rewarm} is more than {key} {interval}: the learning rate reaches only "
            f"{interval / rewarm:.1%} of its peak in each interval. Set schedule.rewarm_steps to at most {interval}"
        )


def _run_warnings(config: RunConfig, plan: StagePlan) -> Iterator[str]:
    """Compare the intervals of evaluations, checkpoints and shown lines with the steps of the run."""
    steps = plan.num_steps
    evaluation, checkpoint = config.evaluation, config.checkpoint
    if config.data.has_validation and evaluation.steps and evaluation.interval > steps:
        yield (
            f"evaluation.interval {evaluation.interval} is more than the {counted(steps, 'step')} of the run: the "
            "validation loss is measured only at the end of each stage"
        )
    if checkpoint.interval > steps:
        yield (
            f"checkpoint.interval {checkpoint.interval} is more than the {counted(steps, 'step')} of the run: "
            "checkpoints are saved only at the end of each stage, and a crash loses all steps since then"
        )
    if config.logging.interval > steps:
        yield (
            f"logging.interval {config.logging.interval} is more than the {counted(steps, 'step')} of the run: "
            "only the last step of each stage is shown"
        )
    kept, interval = checkpoint.keep_every, checkpoint.interval
    if kept and interval and checkpoint.keep:
        period = lcm(kept, interval)
        if period > steps:
            yield (
                f"checkpoint.keep_every {kept} keeps no checkpoint for good: the first multiple of it and of "
                f"checkpoint.interval {interval} is step {period}, but the run has {counted(steps, 'step')}"
            )
        elif kept % interval:
            yield (
                f"checkpoint.keep_every {kept} is not a multiple of checkpoint.interval {interval}: checkpoints are "
                f"kept for good every {counted(period, 'step')}"
            )


def _sample_warnings(config: RunConfig, plan: StagePlan) -> Iterator[str]:
    """Compare samples and tokens with the run, the batch and the context."""
    training, model, steps = config.training, config.model, plan.num_steps
    samples = consumed_samples(training, steps)
    if training.ramp_up is not None and training.ramp_up.samples > samples:
        last = batch_size_at(training, consumed_samples(training, max(0, steps - 1)))
        yield (
            f"training.ramp_up.samples {training.ramp_up.samples} is more than the {counted(samples, 'sample')} of "
            f"the run: the global batch grows to {counted(last, 'sample')} only, not to training.global_batch_size "
            f"{training.global_batch_size}"
        )
    if config.stages.tokens is not None:
        tokens = config.stages.tokens if isinstance(config.stages.tokens, list) else [config.stages.tokens]
        step_tokens = training.batch_sizes[0] * model.seq_length
        least = min((number for number in tokens if number > 0), default=step_tokens)
        if least < step_tokens:
            yield (
                f"stages.tokens {least} is less than the {counted(step_tokens, 'token')} of one step (batch x "
                "model.seq_length): the stage takes one step"
            )
    scaling = model.rope_scaling
    longest = int(scaling.factor * scaling.original_max_position)
    if scaling.factor > 1 and model.seq_length > longest:
        yield (
            f"model.seq_length {model.seq_length} is more than the {counted(longest, 'token')} that "
            f"model.rope_scaling reaches (factor {scaling.factor} x original_max_position "
            f"{scaling.original_max_position})"
        )
