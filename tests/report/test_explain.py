"""The memory that a plan lacks, and changes that really make it fit."""

import pytest
from small_run import VOCAB_SIZE, small_config

from megatron_step.config.cluster import Cluster, NodeGroup
from megatron_step.plan.resolved import resolve
from megatron_step.report.explain import changes_that_fit, least_memory, shortages

CONFIG = small_config(
    model={"num_layers": 8, "num_query_groups": 2},
    stages={"count": 2},
    training={"precision": "bf16", "micro_batch_size": 4},
    planner={"objective": "time", "cluster": "given"},
)


def cluster_of(num_bytes: float) -> Cluster:
    return Cluster([NodeGroup(count=1, gpus_per_node=8, memory_gib=num_bytes / 2**30)])


def test_a_plan_that_fits_is_short_of_nothing() -> None:
    assert shortages(least_memory(resolve(CONFIG, VOCAB_SIZE), cluster_of(2**30))) == []


def test_every_rank_that_lacks_memory_is_named() -> None:
    found = least_memory(resolve(CONFIG, VOCAB_SIZE), cluster_of(2**20))
    short = shortages(found)
    assert [(item.stage.number, item.pp_rank) for item in short] == [(1, 0), (2, 0)]
    for item, stage in zip(short, found.stages):
        assert item.missing_bytes == stage.peak_bytes - 2**20 > 0


@pytest.mark.parametrize("share", [0.97, 0.85, 0.7, 0.5])
def test_the_changes_make_it_fit(share: float) -> None:
    needed = least_memory(resolve(CONFIG, VOCAB_SIZE), cluster_of(2**30)).peak_bytes
    cluster = cluster_of(share * needed)
    changes = changes_that_fit(resolve(CONFIG, VOCAB_SIZE, 2), cluster)
    assert changes
    for name, found in changes:
        assert shortages(found) == [], name
    times = [found.seconds for _, found in changes]
    assert times == sorted(times)


def test_no_change_is_enough() -> None:
    assert changes_that_fit(resolve(CONFIG, VOCAB_SIZE), cluster_of(1000)) == []
