"""The matrix products of a training step alone: the least time that its linears and output layer can take."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_step import ops
from megatron_step.config.model import ModelConfig

Product = tuple[Tensor, Tensor, Tensor]
"""Of a linear y = x Wᵀ: x [t, i], W [o, i] and dy [t, o]."""


def product_shapes(model: ModelConfig) -> list[tuple[int, int]]:
    """Outputs and inputs of every linear of the model, its output layer last."""
    assert model.vocab_size is not None
    heads = model.num_attention_heads + 2 * model.query_groups
    layer = [
        (heads * model.attention_head_size, model.hidden_size),  # qkv
        (model.hidden_size, model.num_attention_heads * model.attention_head_size),  # proj
        (2 * model.ffn_hidden_size, model.hidden_size),  # gate and up
        (model.hidden_size, model.ffn_hidden_size),  # down
    ]
    return layer * model.num_layers + [(model.padded_vocab_size(model.vocab_size), model.hidden_size)]


def product_flops(model: ModelConfig, tokens: int) -> int:
    """Floating-point operations of the products: y, dx and dW of every linear."""
    return 3 * 2 * tokens * sum(outputs * inputs for outputs, inputs in product_shapes(model))


def product_arms(model: ModelConfig, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """y, dx and dW of every linear, by our own choice of library and by torch.mm."""
    generator = torch.Generator().manual_seed(1)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).to(dtype)

    shapes = product_shapes(model)
    inputs = {size: random(tokens, size) for shape in shapes for size in shape}
    products = [(inputs[i], random(o, i), inputs[o]) for o, i in shapes]
    return {"matrix products alone": lambda: _ours(products), "the same by torch.mm": lambda: _torch(products)}


def _ours(products: list[Product]) -> None:
    for x, weight, dy in products:
        ops.linear_output(x, weight)
        ops.linear_input_gradient(dy, weight)
        ops.linear_weight_gradient(dy, x)


def _torch(products: list[Product]) -> None:
    for x, weight, dy in products:
        torch.mm(x, weight.t())
        torch.mm(dy, weight)
        torch.mm(dy.t(), x)
