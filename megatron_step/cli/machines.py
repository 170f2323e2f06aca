"""Turn a machine's name, such as 8x80gb, into a cluster."""

import re

from megatron_step.config.cluster import Cluster, NodeGroup

_USABLE = 0.9  # share of a GPU's memory for a run; the framework and NCCL take the rest
_CPU_GIB = 8.0


def machines(name: str) -> Cluster:
    """Return the cluster that `name` describes.

    `8x80gb` is one node with eight GPUs of 80 GB, `4x8x80gb` is four of these nodes, and `cpu` is one process with
    8 GiB.

    Raises ValueError if the name has another form.
    """
    if name == "cpu":
        return Cluster([NodeGroup(1, 1, _CPU_GIB)], teraflops=0.1)
    found = re.fullmatch(r"(?:(\d+)x)?(\d+)x(\d+)gb", name.lower())
    nodes, gpus, memory = (int(text or 1) for text in found.groups()) if found else (0, 0, 0)
    if not min(nodes, gpus, memory):
        raise ValueError(
            f"--machine {name} is not a valid machine: give cpu, GPUS x MEMORY as in 8x80gb, or NODES x GPUS x MEMORY "
            "as in 4x8x80gb"
        )
    return Cluster([NodeGroup(nodes, gpus, round(_USABLE * memory, 1))])


def cluster_text(cluster: Cluster) -> str:
    """Return the cluster as the text of a YAML file, with comments."""
    group = cluster.nodes[0]
    return (
        "# The machines that config.yaml was planned for.\n"
        f"teraflops: {cluster.teraflops:g}  # TFLOP/s that a GPU sustains in training\n"
        "nodes:\n"
        f"  - count: {group.count}\n"
        f"    gpus_per_node: {group.gpus_per_node}\n"
        f"    memory_gib: {group.memory_gib:g}  # memory of a GPU, without what the framework and NCCL take\n"
        f"    bandwidth_inside: {group.bandwidth_inside:g}  # GB/s from a GPU to the other GPUs of its node\n"
        f"    bandwidth_between: {group.bandwidth_between:g}  # GB/s from a GPU to other nodes\n"
    )
