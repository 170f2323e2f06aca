"""The matrix products of a training step, which give the least time of its linears and its output layer."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_step import ops
from megatron_step.config.model import ModelConfig

Product = tuple[Tensor, Tensor, Tensor]
"""Operands of a linear y = x Wᵀ and its gradients: x [t, i], W [o, i] and dy [t, o]."""


def product_shapes(model: ModelConfig) -> list[tuple[int, int]]:
    """Numbers of outputs and inputs of every linear in the model; the output layer comes last."""
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
    """Floating-point operations of the products y, dx and dW of every linear."""
    return 3 * 2 * tokens * sum(outputs * inputs for outputs, inputs in product_shapes(model))


def product_arms(model: ModelConfig, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Return functions that compute y, dx and dW of every linear, with our choice of library and with torch.mm."""
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
