"""Initial weights that do not depend on the layout of the model.

A weight's full tensor is drawn in blocks of rows. Each block's generator is seeded by the run's seed, the weight's name
and the block's first row. A rank draws only the blocks that overlap with its shard.
"""

import hashlib
import math

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_step.config.model import ModelConfig
from megatron_step.plan.names import is_adapter_a, is_adapter_b, is_bias, writes_residual

_ROWS = 1024  # rows of a block, which limits the memory


def initialize(shards: dict[str, object], model: ModelConfig, seed: int) -> None:
    """Fill the tensors of a model chunk's sharded state dict, in place.

    Matrices get a normal distribution of standard deviation `init_std`. Matrices that write into the residual stream
    get init_std / sqrt(2 num_layers) (GPT-2, Radford et al., 2019). Norms get ones, biases zeros. An adapter's A gets
    1 / sqrt(3 k) for k inputs, and B zeros, so that a new adapter is a no-op (LoRA, Hu et al., 2022).
    """
    for shard in shards.values():
        if isinstance(shard, ShardedTensorFactory):
            gate, up = shard.build()  # SwiGLU's one weight is two tensors in a checkpoint
            _fill(gate, model, seed)
            _fill(up, model, seed)
        elif isinstance(shard, ShardedTensor):
            _fill(shard, model, seed)


@torch.no_grad()
def _fill(shard: ShardedTensor, model: ModelConfig, seed: int) -> None:
    name = shard.key
    if is_bias(name) or is_adapter_b(name):
        shard.data.zero_()
    elif shard.data.dim() == 1:
        shard.data.fill_(1.0)
    elif is_adapter_a(name):
        _fill_normal(shard, 1 / math.sqrt(3 * shard.global_shape[1]), seed)
    else:
        std = model.init_std / math.sqrt(2 * model.num_layers) if writes_residual(name) else model.init_std
        _fill_normal(shard, std, seed)


def _fill_normal(shard: ShardedTensor, std: float, seed: int) -> None:
    """Fill shard.data [rows, columns], which begins at shard.global_offset of the full weight."""
    first_row, first_column = shard.global_offset
    rows, columns = shard.data.shape
    for start in range(first_row // _ROWS * _ROWS, first_row + rows, _ROWS):
        stop = min(start + _ROWS, shard.global_shape[0])
        block = _normal_block(shard.key, start, (stop - start, shard.global_shape[1]), std, seed)
        begin, end = max(start, first_row), min(stop, first_row + rows)
        shard.data[begin - first_row : end - first_row] = block[
            begin - start : end - start, first_column : first_column + columns
        ]


def _normal_block(name: str, row: int, shape: tuple[int, int], std: float, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}/{row}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
