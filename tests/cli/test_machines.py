"""Machines have names that say their size."""

from pathlib import Path

import pytest

from megatron_step.cli.machines import cluster_text, machines
from megatron_step.config.load import load_cluster


@pytest.mark.parametrize(
    ("name", "nodes", "gpus", "memory"),
    [("8x80gb", 1, 8, 72.0), ("4x8X80GB", 4, 8, 72.0), ("1x24gb", 1, 1, 21.6), ("cpu", 1, 1, 8.0)],
)
def test_a_name_is_a_cluster(name: str, nodes: int, gpus: int, memory: float, tmp_path: Path) -> None:
    cluster = machines(name)
    (group,) = cluster.nodes
    assert (group.count, group.gpus_per_node, group.memory_gib) == (nodes, gpus, memory)
    (tmp_path / "cluster.yaml").write_text(cluster_text(cluster))
    assert load_cluster(tmp_path / "cluster.yaml") == cluster


@pytest.mark.parametrize("name", ["gpu", "8x80", "0x80gb", "8x0gb", "2x2x2x2gb", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not a valid machine: give cpu"):
        machines(name)
