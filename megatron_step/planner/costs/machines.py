"""The machine of each pipeline rank: the least memory and speed of its GPUs.

Ranks are numbered as megatron-core does it: tensor-parallel ranks first, then data-parallel, then pipeline ranks. A
pipeline rank is therefore t d GPUs in a row, for t tensor- and d data-parallel ranks; the launcher numbers nodes in
the order in which the cluster lists them.
"""

from dataclasses import dataclass

from megatron_step.config.cluster import Cluster, NodeGroup
from megatron_step.config.numbers import nearest, remedy
from megatron_step.config.parallel import ParallelConfig


@dataclass(frozen=True)
class Machine:
    """The GPUs of a pipeline rank, as good as the worst of them."""

    capacity_bytes: int | None = None
    """Memory of a GPU that may be filled; None for no limit."""
    flops: float = 1.0
    """Floating-point operations of a GPU in a second; of machines that nobody described, 1."""
    tensor_bandwidth: float = float("inf")
    """Bytes that a GPU sends to others of its node in a second."""
    data_bandwidth: float = float("inf")
    """Bytes that a GPU sends to other data-parallel ranks in a second."""


def pipeline_machines(cluster: Cluster | None, parallel: ParallelConfig, dp_size: int) -> tuple[Machine, ...]:
    """Return the machine of each pipeline rank on `dp_size` data-parallel ranks.

    Raises ValueError if the cluster has too few GPUs, or nodes that tensor-parallel ranks do not divide.
    """
    if cluster is None:
        return (Machine(),) * parallel.pipeline_parallel_size
    tensor, width = parallel.tensor_parallel_size, parallel.tensor_parallel_size * dp_size
    needed = width * parallel.pipeline_parallel_size
    if needed > cluster.num_gpus:
        raise ValueError(
            f"the cluster has {cluster.num_gpus} GPUs, but tensor x data x pipeline parallel is {tensor} x {dp_size} x "
            f"{parallel.pipeline_parallel_size} = {needed}"
        )
    gpus = [(group, node) for group in cluster.nodes for node in range(group.count) for _ in range(group.gpus_per_node)]
    for group, _ in gpus[:needed]:
        if group.gpus_per_node % tensor:
            raise ValueError(
                f"parallel.tensor_parallel_size {tensor} does not divide nodes of {group.gpus_per_node} GPUs: "
                f"tensor-parallel ranks must share a node; {_other_widths(cluster, tensor)}"
            )
    blocks = (gpus[first : first + width] for first in range(0, needed, width))
    return tuple(_machine(block, cluster.teraflops) for block in blocks)


def _other_widths(cluster: Cluster, tensor: int) -> str:
    return remedy(
        (
            "parallel.tensor_parallel_size",
            nearest(tensor, lambda size: all(group.gpus_per_node % size == 0 for group in cluster.nodes)),
        )
    )


def _machine(gpus: list[tuple[NodeGroup, int]], teraflops: float) -> Machine:
    groups = [group for group, _ in gpus]
    inside = min(group.bandwidth_inside for group in groups)
    between = min(group.bandwidth_between for group in groups)
    is_one_node = len({(id(group), node) for group, node in gpus}) == 1
    return Machine(
        capacity_bytes=int(min(group.memory_gib for group in groups) * 2**30),
        flops=min(group.relative_speed for group in groups) * teraflops * 1e12,
        tensor_bandwidth=inside * 1e9,
        data_bandwidth=(inside if is_one_node else between) * 1e9,
    )
