"""The micro-batches of a run's steps and of its validation set, on this rank."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megatron_step.config.run import RunConfig, batch_size_at, consumed_samples
from megatron_step.data.batches import BatchStream, batches
from megatron_step.data.datasets import Datasets, build_datasets, repeated_validation
from megatron_step.data.tokenizer import Tokenizer
from megatron_step.engine.parallel import Parallel
from megatron_step.plan.layout import num_microbatches
from megatron_step.training.step import Microbatch


def run_datasets(config: RunConfig, num_steps: int, tokenizer: Tokenizer, parallel: Parallel) -> Datasets:
    """Build the run's training samples and validation set, on the ranks that have the embedding or the loss."""
    return build_datasets(
        config.data,
        config.model.seq_length,
        tokenizer,
        num_train_samples=consumed_samples(config.training, num_steps),
        num_validation_samples=config.evaluation.steps * config.training.global_batch_size,
        is_built_on_rank=parallel.reads_data,
    )


def data_warnings(config: RunConfig) -> list[str]:
    """Return a warning for each corpus that is too small for the validation set. The corpora are already checked."""
    num_samples = config.evaluation.steps * config.training.global_batch_size
    return repeated_validation(config.data, config.model.seq_length, num_samples)


@contextmanager
def training_batches(
    datasets: Datasets, config: RunConfig, parallel: Parallel, steps: range
) -> Iterator[Iterator[list[Microbatch]]]:
    """Yield the micro-batches of each of `steps`, which count from 0 over the whole run."""
    schedule = list(_positions(config, steps))
    if datasets.train is None:
        yield ([None] * num_microbatches(config.training, parallel.dp_size, size) for _, size in schedule)
        return
    micro_batch_size = config.training.micro_batch_size
    with BatchStream(datasets.train, schedule, micro_batch_size, parallel.dp_rank, parallel.dp_size) as stream:
        yield (_to_device(step, parallel) for step in stream)


def _positions(config: RunConfig, steps: range) -> Iterator[tuple[int, int]]:
    """Yield the first sample and the number of samples of each of `steps`."""
    sample = consumed_samples(config.training, steps.start)
    for _ in steps:
        size = batch_size_at(config.training, sample)
        yield sample, size
        sample += size


def validation_reader(datasets: Datasets, config: RunConfig, parallel: Parallel) -> Callable[[int], list[Microbatch]]:
    """Return a function that reads this rank's micro-batches of the i-th global batch of the validation set."""
    size = config.training.global_batch_size

    def read(index: int) -> list[Microbatch]:
        if datasets.validation is None:
            return [None] * num_microbatches(config.training, parallel.dp_size, size)
        read_batches = batches(
            datasets.validation,
            index * size,
            size,
            config.training.micro_batch_size,
            parallel.dp_rank,
            parallel.dp_size,
        )
        return _to_device(read_batches, parallel)

    return read


def _to_device(microbatches: list[dict[str, torch.Tensor]], parallel: Parallel) -> list[Microbatch]:
    return [
        {name: tensor.to(parallel.device, non_blocking=True) for name, tensor in batch.items()}
        for batch in microbatches
    ]
