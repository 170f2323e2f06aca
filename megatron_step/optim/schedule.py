"""The learning rate as a function of the step."""

import math

from megatron_step.config.optimization import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, total_steps: int) -> float:
    """Learning rate of the update that follows `step` finished steps, of `total_steps` in all.

    Warm-up is linear, (step + 1) / warmup_steps of the peak. After it, with x the share of the decay that is done:

        constant    1
        cosine      min + (1 - min) (1 + cos(pi x)) / 2                    from the warm-up's end
        wsd         min + (1 - min) d(x), over the last decay_fraction     d: 1 - x, (1 + cos(pi x)) / 2 or 1 - sqrt(x)
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "cosine":
        start, shape = schedule.warmup_steps, "cosine"
    else:
        start = max(schedule.warmup_steps, total_steps - round(schedule.decay_fraction * total_steps))
        shape = schedule.decay_shape
    if step <= start:
        return peak
    done = min(1.0, (step - start) / (total_steps - start))
    return peak * (schedule.min_fraction + (1 - schedule.min_fraction) * _decay(shape, done))


def _decay(shape: str, done: float) -> float:
    if shape == "linear":
        return 1 - done
    if shape == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return 1 - math.sqrt(done)
