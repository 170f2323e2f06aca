"""Warnings about lengths that do not fit together, such as a warm-up that is longer than its stage.

Each of these configs is valid, and may be meant: a trial run has few steps. So a run prints the warnings and trains.
"""

from collections.abc import Iterator
from math import lcm

from megatron_step.config.counts import counted
from megatron_step.config.run import RunConfig, batch_size_at, consumed_samples
from megatron_step.plan.old_layers import policy_of
from megatron_step.plan.stages import Stage, StagePlan


def length_warnings(config: RunConfig, plan: StagePlan) -> list[str]:
    """Return a warning for each length of the run that does not fit; an empty list if all fit."""
    warnings = [*_run_warnings(config, plan), *_sample_warnings(config, plan)]
    for stage in plan.stages:
        warnings += _stage_warnings(config, stage)
    return list(dict.fromkeys(warnings))


def _stage_warnings(config: RunConfig, stage: Stage) -> Iterator[str]:
    """Compare warm-up and decay with the steps that a stage trains."""
    schedule, number = config.schedule, stage.index + 1
    steps = stage.last_step - stage.first_step
    if steps == 0:
        return
    budget = stage.schedule_steps
    key = "rewarm_steps" if stage.index else "warmup_steps"
    warmup = schedule.rewarm_steps if stage.index else schedule.warmup_steps
    if warmup > steps:
        yield (
            f"schedule.{key} {warmup} is more than the {counted(steps, 'step')} of stage {number}: the learning rate "
            f"reaches only {steps / warmup:.1%} of its peak. Set schedule.{key} to at most {steps}"
        )
    decay = round(schedule.decay_fraction * budget)
    decays = schedule.kind == "wsd" and not stage.grows and schedule.decay_fraction > 0
    if decays and warmup <= steps and decay > budget - warmup:
        yield (
            f"schedule.{key} {warmup} leaves only {counted(budget - warmup, 'step')} of stage {number} for the decay, "
            f"but schedule.decay_fraction {schedule.decay_fraction} asks for {decay} of its {budget} steps. Set "
            f"schedule.{key} to at most {budget - decay}"
        )
    if decays and decay == 0:
        yield (
            f"schedule.decay_fraction {schedule.decay_fraction} of the {counted(budget, 'step')} of stage {number} is "
            "less than a step: the learning rate does not decay"
        )
    if stage.grows and config.stages.grow_at * budget < 1:
        yield (
            f"stages.grow_at {config.stages.grow_at} of the {counted(budget, 'step')} of stage {number} is less than "
            "a step: the model grows after one step"
        )
    if stage.index:
        yield from _change_warnings(config, number, steps)


def _change_warnings(config: RunConfig, number: int, steps: int) -> Iterator[str]:
    """Compare the interval between changes of old layers with the stage's steps and with the re-warm-up."""
    policy, rewarm = policy_of(config), config.schedule.rewarm_steps
    interval, key = policy.change_interval(config), policy.interval_key
    if interval >= steps:
        yield (
            f"{key} {interval} is not less than the {counted(steps, 'step')} of stage {number}: the old layers do not "
            "change in that stage"
        )
    elif 0 < interval < rewarm and policy.rewarms(config):
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
