"""A checkpoint with random weights and adapters, of any depth, without a run."""

from pathlib import Path

import torch
from hf_checkpoints import saved_facts, word_tokenizer
from small_run import VOCAB_SIZE, small_config

from megatron_step.checkpoint.streamed import write_streamed
from megatron_step.config.data import DataConfig
from megatron_step.config.run import RunConfig
from megatron_step.growth.weights import factor_keys
from megatron_step.huggingface.hf_mapping import hf_mapping


def write_random_checkpoint(folder: Path, num_layers: int, precision: str = "fp32", std: float = 0.15) -> RunConfig:
    """Write one into `folder` and give its config; square projections, so that their transposes have their shape."""
    data = DataConfig(train=[(1.0, "unused")], tokenizer=str(word_tokenizer(folder / "tokenizer")))
    config = small_config(
        model={"num_layers": num_layers, "num_query_groups": 2},
        data=data,
        stages={"count": 1, "layers": "auto"},
        training={"precision": precision},
    )
    dtype, rank = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], config.adapter.rank
    shapes = {weight.key: weight.shape for weight in hf_mapping(config.model, VOCAB_SIZE)}
    for key, shape in list(shapes.items()):
        if "linear" in key and len(shape) == 2:
            a, b = factor_keys(key)
            shapes |= {a: (rank, shape[1]), b: (shape[0], rank)}
    generator = torch.Generator().manual_seed(1)

    def draw(key: str) -> torch.Tensor:
        drawn = torch.randn(shapes[key], generator=generator)
        return (1 + std * drawn if len(shapes[key]) == 1 else std * drawn).to(dtype)

    tensors = {key: (shape, dtype) for key, shape in shapes.items()}
    write_streamed(folder / "checkpoints", tensors, draw, saved_facts(config, 0))
    return config
