"""Where a pipeline rank stands: its model chunks, which of them is the model's first or last, and its micro-batches.

Chunk c = v P + p of P V is chunk v of rank p: chunks take turns over the ranks in the order of the layers.
"""

from dataclasses import dataclass

from megatron_step.config.parallel import ParallelConfig
from megatron_step.config.run import TrainingConfig


@dataclass(frozen=True)
class Chunk:
    """A model chunk of a pipeline rank."""

    pp_rank: int
    """p."""
    vp_stage: int
    """v, among the rank's chunks."""
    index: int
    """c, among all chunks."""
    is_first: bool
    """Whether it holds the embedding."""
    is_last: bool
    """Whether it holds the final norm, the output layer and the loss."""


def num_chunks(parallel: ParallelConfig) -> int:
    """P V."""
    return parallel.pipeline_parallel_size * parallel.virtual_pipeline_size


def rank_chunks(parallel: ParallelConfig, pp_rank: int) -> tuple[Chunk, ...]:
    """The chunks of a pipeline rank, bottom up."""
    chunks = []
    for vp_stage in range(parallel.virtual_pipeline_size):
        index = vp_stage * parallel.pipeline_parallel_size + pp_rank
        chunks.append(Chunk(pp_rank, vp_stage, index, index == 0, index == num_chunks(parallel) - 1))
    return tuple(chunks)


def num_microbatches(training: TrainingConfig, dp_size: int, global_batch_size: int | None = None) -> int:
    """Micro-batches of a rank in a step, of full global batches or of the size given."""
    return (global_batch_size or training.global_batch_size) // (training.micro_batch_size * dp_size)
