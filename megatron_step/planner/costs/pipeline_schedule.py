"""The order of a pipeline rank's forward and backward passes, and the number of micro-batches that it keeps at once.

1F1B: a rank starts with as many forward passes as there are ranks after it. Then forward and backward passes alternate.
Interleaved 1F1B (Narayanan et al., 2021): the rank's chunks also take turns, each for as many micro-batches as there
are pipeline ranks (megatron-core's schedules.py, get_pp_rank_microbatches and get_schedule_table).
"""

from collections.abc import Iterator

from megatron_step.config.parallel import ParallelConfig


def passes(parallel: ParallelConfig, num_microbatches: int, pp_rank: int) -> Iterator[tuple[int, bool]]:
    """Yield the passes of a pipeline rank in a step: the index of the chunk on the rank, and whether it is forward."""
    pipeline, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_size
    warmup = pipeline - pp_rank - 1
    if virtual > 1:
        warmup = 2 * warmup + (virtual - 1) * pipeline
    forward = [index // pipeline % virtual for index in range(num_microbatches * virtual)]
    for index, vp_stage in enumerate(forward):
        yield vp_stage, True
        if index >= warmup:
            yield virtual - 1 - forward[index - warmup], False
    for vp_stage in forward[max(0, len(forward) - warmup) :]:
        yield virtual - 1 - vp_stage, False


def held_messages(parallel: ParallelConfig, num_microbatches: int, pp_rank: int) -> int:
    """Return how many messages between pipeline ranks are in memory beside the inputs and outputs of running passes.

    1F1B keeps the last gradient that it sent until the next gradient is computed. Interleaved 1F1B receives messages
    early and waits for sent ones late. Its number is an upper bound of measurements with 2 to 4 chunks on 2 and 4
    pipeline ranks.
    """
    pipeline, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_size
    if virtual > 1:
        return 2 * (virtual - 1) if 2 * pp_rank < pipeline else max(6, 2 * virtual)
    return int(pp_rank > 0 and num_microbatches > 1)


def most_in_flight(parallel: ParallelConfig, num_microbatches: int) -> tuple[int, ...]:
    """Return the most micro-batches in flight for each chunk, in the order of the layers.

    A micro-batch is in flight in a chunk from its forward to its backward pass there.
    """
    pipeline, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_size
    enough = min(num_microbatches, 4 * pipeline)  # more micro-batches only repeat the same pattern of passes
    most = [0] * (pipeline * virtual)
    for pp_rank in range(pipeline):
        live = [0] * virtual
        for vp_stage, is_forward in passes(parallel, enough, pp_rank):
            live[vp_stage] += 1 if is_forward else -1
            chunk = vp_stage * pipeline + pp_rank
            most[chunk] = max(most[chunk], live[vp_stage])
    return tuple(most)
