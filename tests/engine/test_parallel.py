"""Every rank has its place in the layout, and hears of another rank's problem."""

import pytest
import torch
from megatron.core import parallel_state
from worlds import Worlds

from megatron_step.config.parallel import ParallelConfig
from megatron_step.engine.parallel import Parallel, first_problem, parallel_layout, start_world, stop_world


def test_ranks_of_a_world_have_different_places(worlds: Worlds) -> None:
    layout = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2)
    places = worlds(8).run(_place, config=layout)
    # tensor-parallel ranks are neighbours, pipeline ranks are furthest apart
    assert [place[1:4] for place in places] == [(tp, pp, dp) for pp in range(2) for dp in range(2) for tp in range(2)]
    assert [place[0] for place in places] == list(range(8))
    assert all(place[4] == 2 for place in places), "data-parallel size"


def _place(config: ParallelConfig) -> tuple[int, ...]:
    with parallel_layout(config, seed=1) as parallel:
        assert parallel.is_main == (parallel.global_rank == 0)
        assert parallel.groups.tp.size() == 2
        return (parallel.global_rank, parallel.tp_rank, parallel.pp_rank, parallel.dp_rank, parallel.dp_size)


def test_work_for_one_process_does_not_wait_for_the_ranks_of_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with parallel_layout(ParallelConfig(), seed=1, alone=True) as parallel:
        assert (parallel.global_rank, parallel.world_size, parallel.is_main) == (0, 1, True)


def test_only_the_ends_of_a_pipeline_read_data(worlds: Worlds) -> None:
    assert worlds(4).run(_reads_data, config=ParallelConfig(pipeline_parallel_size=4)) == [True, False, False, True]


def _reads_data(config: ParallelConfig) -> bool:
    with parallel_layout(config, seed=1) as parallel:
        return parallel.reads_data


def test_a_world_that_does_not_fit_is_refused_on_every_rank(worlds: Worlds) -> None:
    answers = worlds(2).run(_refusal, config=ParallelConfig(tensor_parallel_size=4))
    assert len(answers) == 2
    for answer in answers:
        assert "a world of 2 ranks does not fit parallel.tensor_parallel_size 4" in answer
        assert "start a multiple of 4 ranks" in answer


def _refusal(config: ParallelConfig) -> str:
    with pytest.raises(ValueError) as caught, parallel_layout(config, seed=1):
        pass
    return str(caught.value)


def test_the_lowest_ranks_problem_is_told_to_all(worlds: Worlds) -> None:
    assert worlds(4).run(_problem, faulty=[1, 3]) == ["rank 1 fell"] * 4
    assert worlds(4).run(_problem, faulty=[]) == [None] * 4


def _problem(faulty: list[int]) -> str | None:
    rank = torch.distributed.get_rank()
    return first_problem(f"rank {rank} fell" if rank in faulty else None)


def test_without_torchrun_there_is_a_world_of_one(alone: Parallel) -> None:
    assert (alone.global_rank, alone.world_size) == (0, 1)
    assert (alone.tp_rank, alone.pp_rank, alone.dp_rank, alone.dp_size) == (0, 0, 0, 1)
    start_world()
    assert torch.distributed.get_world_size() == 1, "a second start changes nothing"


def test_groups_are_taken_down_at_the_end_even_of_a_failure() -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="inside"), parallel_layout(ParallelConfig(), seed=1):
            raise RuntimeError("inside")
        assert not parallel_state.is_initialized()
    stop_world()
    assert not torch.distributed.is_initialized()
