"""The order of passes is megatron-core's, and keeps as many micro-batches at once."""

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megatron_step.config.parallel import ParallelConfig
from megatron_step.planner.costs.pipeline_schedule import held_messages, most_in_flight, passes


def at_once(parallel: ParallelConfig, num_microbatches: int, pp_rank: int) -> int:
    """The most forward passes whose backward pass has not come yet."""
    live = most = 0
    for _, is_forward in passes(parallel, num_microbatches, pp_rank):
        live += 1 if is_forward else -1
        most = max(most, live)
    assert live == 0
    return most


def test_one_forward_one_backward_keeps_a_micro_batch_for_each_later_rank_and_its_own() -> None:
    parallel = ParallelConfig(pipeline_parallel_size=4)
    assert [at_once(parallel, 8, rank) for rank in range(4)] == [4, 3, 2, 1]
    assert [at_once(parallel, 2, rank) for rank in range(4)] == [2, 2, 2, 1]
    assert at_once(ParallelConfig(), 8, 0) == 1


def test_interleaving_keeps_more() -> None:
    parallel = ParallelConfig(pipeline_parallel_size=4, virtual_pipeline_size=2)
    # (P - p - 1) 2 + (V - 1) P passes of warm-up, and the one under way
    assert [at_once(parallel, 8, rank) for rank in range(4)] == [11, 9, 7, 5]
    assert [at_once(parallel, 4, rank) for rank in range(4)] == [8, 8, 7, 5]


@pytest.mark.parametrize(("pipeline", "virtual"), [(2, 2), (2, 3), (4, 2)])
def test_chunks_take_turns_as_in_megatron_core(pipeline: int, virtual: int) -> None:
    parallel = ParallelConfig(pipeline_parallel_size=pipeline, virtual_pipeline_size=virtual)
    for rank in range(pipeline):
        order = list(passes(parallel, 8, rank))
        forward = [vp_stage for vp_stage, is_forward in order if is_forward]
        backward = [vp_stage for vp_stage, is_forward in order if not is_forward]
        table = [chunk for _, chunk in get_schedule_table(8, virtual, pipeline)]
        assert forward == table
        assert backward == [virtual - 1 - chunk for chunk in table]


def test_only_ranks_that_exchange_hold_messages() -> None:
    assert held_messages(ParallelConfig(), 8, 0) == 0
    assert [held_messages(ParallelConfig(pipeline_parallel_size=2), 8, rank) for rank in range(2)] == [0, 1]
    assert held_messages(ParallelConfig(pipeline_parallel_size=2), 1, 1) == 0
    assert held_messages(ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_size=2), 8, 1) > 1


@pytest.mark.parametrize(
    ("pipeline", "virtual", "num_microbatches"), [(1, 1, 4), (4, 1, 8), (4, 1, 2), (2, 2, 8), (4, 3, 32)]
)
def test_the_most_in_flight_in_each_chunk(pipeline: int, virtual: int, num_microbatches: int) -> None:
    parallel = ParallelConfig(pipeline_parallel_size=pipeline, virtual_pipeline_size=virtual)
    most = most_in_flight(parallel, num_microbatches)
    for pp_rank in range(pipeline):
        live, seen = [0] * virtual, [0] * virtual
        for vp_stage, is_forward in passes(parallel, num_microbatches, pp_rank):
            live[vp_stage] += 1 if is_forward else -1
            seen = [max(pair) for pair in zip(seen, live)]
        assert list(most[pp_rank::pipeline]) == seen
