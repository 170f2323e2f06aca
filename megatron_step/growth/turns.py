"""Reads a checkpoint a layer at a time, so that little of it is alive beside the new model."""

from collections.abc import Iterator, Mapping

from megatron_step.engine.parallel import Parallel
from megatron_step.model.build import Sharded
from megatron_step.plan.names import layer_of
from megatron_step.plan.stages import Stage


def turns(
    shards: Mapping[str, Sharded], stage: Stage, parallel: Parallel
) -> Iterator[tuple[int | None, dict[str, Sharded]]]:
    """Yield this rank's tensors in parts: those outside the layers (None), then one layer after another.

    Every rank gets as many parts, since all must take part in reading each; where a rank has no layer left, empty ones.
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
    """Layers of the pipeline rank that holds the most."""
    pipeline = parallel.config.pipeline_parallel_size
    return max(sum(stage.layout[rank::pipeline]) for rank in range(pipeline))
