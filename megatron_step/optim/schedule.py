"""The learning rate as a function of the step."""

import math

from megatron_step.config.optimization import ScheduleConfig


def learning_rate(
    schedule: ScheduleConfig,
    peak: float,
    step: int,
    total_steps: int,
    *,
    warmup_steps: int,
    since_restart: int,
    grows: bool = False,
) -> float:
    """Learning rate of the update that follows `step` finished steps of a schedule of `total_steps`.

    Warm-up is linear, (step + 1) / warmup_steps of the peak, and so is the re-warm-up after a restart of the adapters
    (ReLoRA), (since_restart + 1) / rewarm_steps of what it would be. After the warm-up, with x the share of the decay
    that is done:

        constant    1                                                      and wsd in a stage that grows at its end
        cosine      min + (1 - min) (1 + cos(pi x)) / 2                    from the warm-up's end
        wsd         min + (1 - min) d(x), over the last decay_fraction     d: 1 - x, (1 + cos(pi x)) / 2 or 1 - sqrt(x)
    """
    rate = peak * _shape(schedule, step, total_steps, warmup_steps, grows)
    if since_restart < min(step, schedule.rewarm_steps):
        return rate * (since_restart + 1) / schedule.rewarm_steps
    return rate


def rewarm_share(schedule: ScheduleConfig, since: int) -> float:
    """Share of the learning rate that is reached `since` steps after the start of a re-warm-up, in (0, 1]."""
    return min(1.0, (since + 1) / schedule.rewarm_steps) if schedule.rewarm_steps else 1.0


def _shape(schedule: ScheduleConfig, step: int, total_steps: int, warmup_steps: int, grows: bool) -> float:
    """Learning rate as a share of the peak."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule.kind == "constant" or (schedule.kind == "wsd" and grows):
        return 1.0  # growth out of a decay does not recover (arXiv 2511.04981)
    if schedule.kind == "cosine":
        start, shape = warmup_steps, "cosine"
    else:
        start = max(warmup_steps, total_steps - round(schedule.decay_fraction * total_steps))
        shape = schedule.decay_shape
    if step <= start:
        return 1.0
    done = min(1.0, (step - start) / (total_steps - start))
    return schedule.min_fraction + (1 - schedule.min_fraction) * _decay(shape, done)


def _decay(shape: str, done: float) -> float:
    if shape == "linear":
        return 1 - done
    if shape == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return 1 - math.sqrt(done)
