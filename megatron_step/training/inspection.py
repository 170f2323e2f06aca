"""Inspect a checkpoint: load its whole model on each data-parallel rank, and compute its validation loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_step.checkpoint.load import FoundCheckpoint, find_at
from megatron_step.checkpoint.manifest import saved_config
from megatron_step.config.parallel import ParallelConfig
from megatron_step.config.run import RunConfig
from megatron_step.data.tokenizer import Tokenizer, fitting_tokenizer
from megatron_step.engine.launcher import started_by_torchrun
from megatron_step.engine.parallel import Parallel, parallel_layout, stop_world
from megatron_step.growth.whole_model import whole_model
from megatron_step.plan.stages import plan_from_dict
from megatron_step.training.batches import run_datasets, validation_reader
from megatron_step.training.hooks.evaluation import validation_loss


@dataclass(frozen=True)
class Inspected:
    """The whole model of a checkpoint, with merged adapters."""

    found: FoundCheckpoint
    """The checkpoint."""
    config: RunConfig
    """The config of its run, with a data-parallel layout."""
    tokenizer: Tokenizer
    """The run's tokenizer."""
    chunks: list[torch.nn.Module]
    """The model, in evaluation mode."""
    parallel: Parallel
    """This process's place in the world, in which all ranks are data-parallel."""


@contextmanager
def open_checkpoint(
    path: Path, tokenizer: str | None = None, end_of_document: str | None = None
) -> Iterator[Inspected]:
    """Load the model of a checkpoint, or of the newest whole checkpoint in a run's folder, on every rank.

    `tokenizer` is the path of the tokenizer; None takes the run's path. `end_of_document` is the token that ends
    documents; None takes the run's token.

    Raises ValueError if there is no checkpoint, or if it does not fit its tokenizer.
    """
    try:
        with parallel_layout(ParallelConfig(), seed=1, alone=not started_by_torchrun()) as parallel:
            found = find_at(path, parallel)
            manifest = found.manifest
            config = replace(saved_config(manifest), parallel=ParallelConfig())
            fitting = fitting_tokenizer(
                tokenizer or config.data.tokenizer,
                manifest.vocab_size,
                manifest.data_fingerprint.get("tokenizer"),
                config.data.tokenizer,
                end_of_document or config.data.end_of_document,
            )
            model = whole_model(found, config.training.precision, parallel)
            yield Inspected(found, config, fitting, [model], parallel)
    finally:
        stop_world()


def checkpoint_loss(inspected: Inspected) -> float | None:
    """Return the mean loss over the run's validation set, in nats per token; None if the run has no such set."""
    config = inspected.config
    if not (config.data.has_validation and config.evaluation.steps):
        return None
    num_steps = plan_from_dict(inspected.found.manifest.plan).num_steps
    datasets = run_datasets(config, num_steps, inspected.tokenizer, inspected.parallel)
    read_batch = validation_reader(datasets, config, inspected.parallel)
    return validation_loss(inspected.chunks, read_batch, config, inspected.parallel)
