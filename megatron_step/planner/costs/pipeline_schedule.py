"""The order of a pipeline rank's forward and backward passes, and so how many micro-batches it keeps at once.

1F1B: a rank starts with as many forward passes as there are ranks after it, then a forward and a backward pass take
turns. Interleaved 1F1B (Narayanan et al., 2021): the rank's chunks take turns as well, each for as many micro-batches
as there are pipeline ranks (megatron-core's schedules.py, get_pp_rank_microbatches and get_schedule_table).
"""

from collections.abc import Iterator

from megatron_step.config.parallel import ParallelConfig


def passes(parallel: ParallelConfig, num_microbatches: int, pp_rank: int) -> Iterator[tuple[int, bool]]:
    """A pipeline rank's passes in a step: the number of the chunk, and whether forward."""
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
    """Messages between pipeline ranks that are in memory beside inputs and outputs of the passes under way.

    1F1B keeps the gradient that it sent last until it has the next. Interleaved 1F1B receives ahead and waits late: a
    bound of what was measured with 2 to 4 chunks on 2 and 4 pipeline ranks.
    """
    pipeline, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_size
    if virtual > 1:
        return 2 * (virtual - 1) if 2 * pp_rank < pipeline else max(6, 2 * virtual)
    return int(pp_rank > 0 and num_microbatches > 1)


def most_in_flight(parallel: ParallelConfig, num_microbatches: int) -> tuple[int, ...]:
    """For each chunk, in the order of the layers, the most micro-batches that are between their two passes in it."""
    pipeline, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_size
    enough = min(num_microbatches, 4 * pipeline)  # by then passes repeat themselves
    most = [0] * (pipeline * virtual)
    for pp_rank in range(pipeline):
        live = [0] * virtual
        for vp_stage, is_forward in passes(parallel, enough, pp_rank):
            live[vp_stage] += 1 if is_forward else -1
            chunk = vp_stage * pipeline + pp_rank
            most[chunk] = max(most[chunk], live[vp_stage])
    return tuple(most)
