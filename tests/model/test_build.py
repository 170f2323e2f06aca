"""A rank builds the chunks of its place in the pipeline, with global layer numbers in their keys."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from megatron.core.transformer.module import Float16Module
from small_run import VOCAB_SIZE, small_config
from worlds import Worlds

from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel, parallel_layout
from megatron_step.model.build import build_model, sharded_state


@pytest.mark.parametrize(
    ("parallel", "layers"),
    [
        ({"pipeline_parallel_size": 2}, [[[0, 1]], [[2, 3]]]),
        ({"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}, [[[0], [2]], [[1], [3]]]),
        ({"tensor_parallel_size": 2}, [[[0, 1, 2, 3]]] * 2),
    ],
)
def test_layers_of_each_rank(worlds: Worlds, parallel: dict[str, Any], layers: list[list[list[int]]]) -> None:
    built = worlds(2).run(_layers, config=small_config(parallel=parallel))
    assert [chunks for chunks, _ in built] == layers
    ends = [end for _, end in built]
    if "pipeline_parallel_size" in parallel:
        assert ends == [(True, False), (False, True)], "the first rank embeds, the last one has the output layer"
    else:
        assert ends == [(True, True)] * 2


def test_layers_of_an_uneven_layout(worlds: Worlds) -> None:
    parallel = {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}
    built = worlds(2).run(_layers, config=small_config(parallel=parallel), layout=(2, 1, 3, 1))
    assert [chunks for chunks, _ in built] == [[[0, 1], [3, 4, 5]], [[2], [6]]]


def test_the_layout_gives_the_depth(alone: Parallel) -> None:
    (chunk,) = build_model(small_config().model, VOCAB_SIZE, alone, "fp32", seed=1, layout=(2,))
    assert len(chunk.decoder.layers) == 2
    # Output projections are drawn for the depth that the model has, not for the finished one's.
    mlp = chunk.decoder.layers[1].mlp
    scale = (mlp.linear_fc2.weight.std() / mlp.linear_fc1.weight.std()).item()
    assert scale == pytest.approx(1 / math.sqrt(2 * 2), rel=0.05)


def _layers(config: RunConfig, layout: Sequence[int] | None = None) -> tuple[list[list[int]], tuple[bool, bool]]:
    with parallel_layout(config.parallel, seed=1) as parallel:
        chunks = build_model(config.model, VOCAB_SIZE, parallel, "fp32", seed=1, layout=layout)
        numbers = []
        for chunk in chunks:
            keys = [getattr(shard, "key", "") for shard in sharded_state(chunk, parallel).values()]
            numbers.append(sorted({int(key.split(".")[2]) for key in keys if key.startswith("decoder.layers.")}))
        return numbers, (hasattr(chunks[0], "embedding"), hasattr(chunks[-1], "output_layer"))


def test_the_vocabulary_is_padded_and_bf16_is_wrapped(alone: Parallel) -> None:
    (chunk,) = build_model(small_config().model, VOCAB_SIZE, alone, "bf16", seed=1)
    assert isinstance(chunk, Float16Module)
    assert {param.dtype for param in chunk.parameters()} == {torch.bfloat16}
    assert chunk.module.embedding.word_embeddings.weight.shape == (256, 64)
