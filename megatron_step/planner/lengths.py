"""Lengths of a run that must fit into each other: what they come to where one is longer than what holds it.

All of it is legal, and some of it is meant, as in a trial of a few steps; so a run says it and trains.
"""

from collections.abc import Iterator
from math import lcm

from megatron_step.config.run import RunConfig, batch_size_at, consumed_samples
from megatron_step.plan.old_layers import policy_of
from megatron_step.plan.stages import Stage, StagePlan


def length_warnings(config: RunConfig, plan: StagePlan) -> list[str]:
    """Say, with the numbers, which lengths of a run do not fit into each other; nothing where all do."""
    warnings = [*_of_run(config, plan), *_of_samples(config, plan)]
    for stage in plan.stages:
        warnings += _of_stage(config, stage)
    return list(dict.fromkeys(warnings))


def _of_stage(config: RunConfig, stage: Stage) -> Iterator[str]:
    """Warm-up and decay against the steps that a stage trains."""
    schedule, number = config.schedule, stage.index + 1
    steps = stage.last_step - stage.first_step
    if steps == 0:
        return
    budget = stage.schedule_steps
    key = "rewarm_steps" if stage.index else "warmup_steps"
    warmup = schedule.rewarm_steps if stage.index else schedule.warmup_steps
    if warmup > steps:
        yield (
            f"schedule.{key} {warmup} is more than the {steps} steps of stage {number}: its learning rate ends at "
            f"{steps / warmup:.1%} of its peak. Set it to at most {steps}"
        )
    decay = round(schedule.decay_fraction * budget)
    decays = schedule.kind == "wsd" and not stage.grows and schedule.decay_fraction > 0
    if decays and warmup <= steps and decay > budget - warmup:
        yield (
            f"schedule.{key} {warmup} leaves {budget - warmup} of the {decay} steps that stage {number} of {budget} "
            f"steps is to decay over (schedule.decay_fraction {schedule.decay_fraction}): the decay is shorter. "
            f"Set it to at most {budget - decay}"
        )
    if decays and decay == 0:
        yield (
            f"schedule.decay_fraction {schedule.decay_fraction} of the {budget} steps of stage {number} is less than "
            "a step: the learning rate does not decay"
        )
    if stage.grows and config.stages.grow_at * budget < 1:
        yield (
            f"stages.grow_at {config.stages.grow_at} of the {budget} steps of stage {number} is less than a step: "
            "the model grows after one step"
        )
    if stage.index:
        yield from _of_changes(config, number, steps)


def _of_changes(config: RunConfig, number: int, steps: int) -> Iterator[str]:
    """Changes of old layers against a stage's steps, and the re-warm-up against the interval of changes."""
    policy, rewarm = policy_of(config), config.schedule.rewarm_steps
    interval, key = policy.change_interval(config), policy.interval_key
    if interval >= steps:
        yield (
            f"{key} {interval} is not less than the {steps} steps of stage {number}: it never comes due in that stage"
        )
    elif 0 < interval < rewarm:
        yield (
            f"schedule.rewarm_steps {rewarm} is more than {key} {interval}: after each of these intervals the "
            f"learning rate gets to {interval / rewarm:.1%} of its peak. Set it to at most {interval}"
        )


def _of_run(config: RunConfig, plan: StagePlan) -> Iterator[str]:
    """What happens every so many steps, against the steps of the run."""
    steps = plan.num_steps
    evaluation, checkpoint = config.evaluation, config.checkpoint
    if config.data.has_validation and evaluation.steps and evaluation.interval > steps:
        yield (
            f"evaluation.interval {evaluation.interval} is more than the {steps} steps of the run: the validation loss "
            "is measured at the end of each stage only"
        )
    if checkpoint.interval > steps:
        yield (
            f"checkpoint.interval {checkpoint.interval} is more than the {steps} steps of the run: it is saved at the "
            "end of each stage only, and a crash before loses all steps of the stage"
        )
    if config.logging.interval > steps:
        yield (
            f"logging.interval {config.logging.interval} is more than the {steps} steps of the run: no step is shown "
            "but the last of each stage"
        )
    kept, interval = checkpoint.keep_every, checkpoint.interval
    if kept and interval and checkpoint.keep:
        period = lcm(kept, interval)
        if period > steps:
            yield (
                f"checkpoint.keep_every {kept} keeps no checkpoint for good: the first saved step that is a multiple "
                f"of it and of checkpoint.interval {interval} is {period}, and the run has {steps} steps"
            )
        elif kept % interval:
            yield (
                f"checkpoint.keep_every {kept} is not a multiple of checkpoint.interval {interval}: checkpoints are "
                f"kept for good every {period} steps"
            )


def _of_samples(config: RunConfig, plan: StagePlan) -> Iterator[str]:
    """Tokens and samples against the batch and the context."""
    training, model, steps = config.training, config.model, plan.num_steps
    samples = consumed_samples(training, steps)
    if training.ramp_up is not None and training.ramp_up.samples > samples:
        last = batch_size_at(training, consumed_samples(training, max(0, steps - 1)))
        yield (
            f"training.ramp_up.samples {training.ramp_up.samples} is more than the {samples} samples of the run: the "
            f"global batch gets to {last} samples, not to training.global_batch_size {training.global_batch_size}"
        )
    if config.stages.tokens is not None:
        tokens = config.stages.tokens if isinstance(config.stages.tokens, list) else [config.stages.tokens]
        step_tokens = training.batch_sizes[0] * model.seq_length
        least = min((number for number in tokens if number > 0), default=step_tokens)
        if least < step_tokens:
            yield (
                f"stages.tokens {least} is less than the {step_tokens} tokens of one step (batch x model.seq_length): "
                "the stage takes one step"
            )
    scaling = model.rope_scaling
    longest = int(scaling.factor * scaling.original_max_position)
    if scaling.factor > 1 and model.seq_length > longest:
        yield (
            f"model.seq_length {model.seq_length} is more than the {longest} tokens that model.rope_scaling reaches "
            f"(factor {scaling.factor} x original_max_position {scaling.original_max_position})"
        )
