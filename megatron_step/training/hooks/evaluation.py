"""Validation loss over a fixed set, as a hook of the training loop."""

import math
from collections.abc import Callable

import torch

from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel
from megatron_step.training.stage import Hook, StepContext
from megatron_step.training.step import Microbatch, evaluate_batch


def evaluation_hook(read_batch: Callable[[int], list[Microbatch]], config: RunConfig, parallel: Parallel) -> Hook:
    """Return a hook that adds `validation_loss` and `validation_perplexity` at each interval and at a stage's end.

    `read_batch(i)` returns this rank's micro-batches of the i-th global batch of the validation set.
    """

    def hook(context: StepContext) -> None:
        finished = context.state.step == context.state.stage.last_step
        if finished or context.is_due(config.evaluation.interval):
            loss = validation_loss(context.state.chunks, read_batch, config, parallel)
            context.metrics["validation_loss"] = loss
            context.metrics["validation_perplexity"] = math.exp(min(loss, 700.0))  # exp(710) is beyond a float

    return hook


def validation_loss(
    chunks: list[torch.nn.Module], read_batch: Callable[[int], list[Microbatch]], config: RunConfig, parallel: Parallel
) -> float:
    """Return the mean loss, in nats per token, over the `evaluation.steps` global batches of the validation set."""
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        losses = [
            evaluate_batch(chunks, read_batch(index), config, parallel) for index in range(config.evaluation.steps)
        ]
    for chunk in chunks:
        chunk.train()
    return sum(losses) / len(losses)
