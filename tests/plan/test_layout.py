"""Every chunk of the pipeline is there once, and one is the first, one the last."""

import pytest

from megatron_step.config.parallel import ParallelConfig
from megatron_step.config.run import TrainingConfig
from megatron_step.plan.layout import num_chunks, num_microbatches, rank_chunks


@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (4, 1), (2, 3)])
def test_chunks_take_turns_over_the_ranks(pipeline: int, virtual: int) -> None:
    parallel = ParallelConfig(pipeline_parallel_size=pipeline, virtual_pipeline_size=virtual)
    chunks = [chunk for pp_rank in range(pipeline) for chunk in rank_chunks(parallel, pp_rank)]
    assert sorted(chunk.index for chunk in chunks) == list(range(num_chunks(parallel)))
    assert [(chunk.pp_rank, chunk.vp_stage) for chunk in chunks if chunk.is_first] == [(0, 0)]
    assert [(chunk.pp_rank, chunk.vp_stage) for chunk in chunks if chunk.is_last] == [(pipeline - 1, virtual - 1)]
    assert all(chunk.index % pipeline == chunk.pp_rank for chunk in chunks)


def test_micro_batches_of_a_step() -> None:
    training = TrainingConfig(global_batch_size=24, micro_batch_size=2)
    assert (num_microbatches(training, 3), num_microbatches(training, 3, 12)) == (4, 2)
