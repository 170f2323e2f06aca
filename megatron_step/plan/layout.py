"""The model chunks of a pipeline rank, and the number of micro-batches in a step.

With P pipeline ranks and V chunks per rank, chunk c = v P + p of the model is chunk v of rank p. So consecutive chunks
are on consecutive ranks.
"""

from dataclasses import dataclass

from megatron_step.config.parallel import ParallelConfig
from megatron_step.config.run import TrainingConfig


@dataclass(frozen=True)
class Chunk:
    """A model chunk of a pipeline rank."""

    pp_rank: int
    """Pipeline rank, p."""
    vp_stage: int
    """Index among the rank's chunks, v."""
    index: int
    """Index among all chunks of the model, c."""
    is_first: bool
    """Whether the chunk holds the embedding."""
    is_last: bool
    """Whether the chunk holds the final norm, the output layer and the loss."""


def num_chunks(parallel: ParallelConfig) -> int:
    """Return the number of chunks of the model, P V."""
    return parallel.pipeline_parallel_size * parallel.virtual_pipeline_size


def rank_chunks(parallel: ParallelConfig, pp_rank: int) -> tuple[Chunk, ...]:
    """Return the chunks of a pipeline rank, in the order of the layers."""
    chunks = []
    for vp_stage in range(parallel.virtual_pipeline_size):
        index = vp_stage * parallel.pipeline_parallel_size + pp_rank
        chunks.append(Chunk(pp_rank, vp_stage, index, index == 0, index == num_chunks(parallel) - 1))
    return tuple(chunks)


def num_microbatches(training: TrainingConfig, dp_size: int, global_batch_size: int | None = None) -> int:
    """Return the number of micro-batches of a data-parallel rank in a step; None means the full global batch."""
    return (global_batch_size or training.global_batch_size) // (training.micro_batch_size * dp_size)
