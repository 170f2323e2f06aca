"""Read a checkpoint one layer at a time, so that little of it is in memory beside the new model."""

from collections.abc import Iterator, Mapping

from megatron_step.engine.parallel import Parallel
from megatron_step.model.build import Sharded
from megatron_step.plan.names import layer_of
from megatron_step.plan.stages import Stage


def turns(
    shards: Mapping[str, Sharded], stage: Stage, parallel: Parallel
) -> Iterator[tuple[int | None, dict[str, Sharded]]]:
    """Yield this rank's tensors in groups: first those outside the layers (None), then one layer after another.

    All ranks must take part in reading each group, so all ranks get the same number of groups. A rank with fewer layers
    gets empty groups at the end.
    """
    yield None, {name: shard for name, shard in shards.items() if layer_of(shard.key) < 0}
    own = sorted({layer_of(shard.key) for shard in shards.values()} - {-1})
    for turn in range(_most_layers(stage, parallel)):
        layer = own[turn] if turn < len(own) else None
        yield (
            layer,
            {name: shard for name, shard in shards.items() if layer is not None and layer_of(shard.key) == layer},
        )


def _most_layers(stage: Stage, parallel: Parallel) -> int:
    """Return the largest number of layers that a pipeline rank holds."""
    pipeline = parallel.config.pipeline_parallel_size
    return max(sum(stage.layout[rank::pipeline]) for rank in range(pipeline))
