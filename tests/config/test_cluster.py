"""Clusters and what the planner is asked for."""

from typing import Any

import pytest

from megatron_step.config.cluster import Cluster, NodeGroup, PlannerConfig

GROUP: dict[str, Any] = {"count": 2, "gpus_per_node": 8, "memory_gib": 72}


def test_gpus_of_all_nodes() -> None:
    assert Cluster([NodeGroup(**GROUP), NodeGroup(3, 4, 36)]).num_gpus == 28


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": 0}, "nodes.count must be at least 1, not 0"),
        ({"gpus_per_node": -1}, "nodes.gpus_per_node must be at least 1"),
        ({"memory_gib": -72}, "nodes.memory_gib must be a positive number, not -72"),
        ({"memory_gib": float("nan")}, "nodes.memory_gib must be a positive number, not nan"),
        ({"memory_gib": float("inf")}, "nodes.memory_gib must be a positive number, not inf"),
        ({"relative_speed": 0}, "nodes.relative_speed must be a positive number"),
        ({"bandwidth_between": 0}, "nodes.bandwidth_between must be a positive number"),
    ],
)
def test_groups_that_cannot_be(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NodeGroup(**{**GROUP, **changed})


def test_clusters_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="nodes is empty"):
        Cluster([])
    with pytest.raises(ValueError, match="teraflops must be a positive number"):
        Cluster([NodeGroup(**GROUP)], teraflops=0)


def test_the_least_time_needs_a_limit_of_memory() -> None:
    with pytest.raises(ValueError, match="planner.objective time needs .*: set planner.cluster"):
        PlannerConfig(objective="time")
    with pytest.raises(ValueError, match="planner.time_limit must be positive"):
        PlannerConfig(time_limit=0)
