"""The machine of each pipeline rank."""

import pytest

from megatron_step.config.cluster import Cluster, NodeGroup
from megatron_step.config.parallel import ParallelConfig
from megatron_step.planner.costs.machines import Machine, pipeline_machines

LARGE = NodeGroup(count=2, gpus_per_node=8, memory_gib=72, bandwidth_inside=450, bandwidth_between=50)
SMALL = NodeGroup(
    count=2, gpus_per_node=8, memory_gib=36, relative_speed=0.5, bandwidth_inside=300, bandwidth_between=25
)
MIXED = Cluster([LARGE, SMALL], teraflops=400)


def test_without_a_cluster_ranks_have_no_limit() -> None:
    assert pipeline_machines(None, ParallelConfig(pipeline_parallel_size=3), 2) == (Machine(),) * 3


def test_a_pipeline_rank_is_a_row_of_gpus() -> None:
    parallel = ParallelConfig(tensor_parallel_size=4, pipeline_parallel_size=4)
    machines = pipeline_machines(MIXED, parallel, dp_size=2)
    assert [machine.capacity_bytes for machine in machines] == [72 * 2**30] * 2 + [36 * 2**30] * 2
    assert [machine.flops for machine in machines] == [400e12] * 2 + [200e12] * 2
    assert [machine.tensor_bandwidth for machine in machines] == [450e9] * 2 + [300e9] * 2
    # Both data-parallel ranks are in one node.
    assert [machine.data_bandwidth for machine in machines] == [450e9] * 2 + [300e9] * 2


def test_the_worst_gpu_of_a_row_counts() -> None:
    (machine,) = pipeline_machines(MIXED, ParallelConfig(), dp_size=32)
    assert machine == Machine(36 * 2**30, 200e12, 300e9, 25e9)


def test_rows_over_two_nodes_exchange_between_them() -> None:
    parallel = ParallelConfig(tensor_parallel_size=8, pipeline_parallel_size=2)
    assert [machine.data_bandwidth for machine in pipeline_machines(MIXED, parallel, dp_size=2)] == [50e9, 25e9]


@pytest.mark.parametrize(
    ("parallel", "dp_size", "message"),
    [
        ({"tensor_parallel_size": 8, "pipeline_parallel_size": 4}, 2, "has 32 GPUs, .* is 8 x 2 x 4 = 64"),
        ({"tensor_parallel_size": 16, "pipeline_parallel_size": 2}, 1, "16 does not divide nodes of 8 GPUs"),
        (
            {"tensor_parallel_size": 3},
            1,
            "3 does not divide nodes of 8 GPUs: .* to 2 or 4",
        ),
    ],
)
def test_layouts_that_do_not_fit(parallel: dict[str, int], dp_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline_machines(MIXED, ParallelConfig(**parallel), dp_size)
