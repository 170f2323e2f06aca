import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.products import product_arms, product_flops, product_shapes
from megatron_step import ops
from megatron_step.config.model import ModelConfig

TINY = ModelConfig(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    seq_length=8,
    vocab_size=128,
)


def test_shapes_are_those_of_the_weights():
    assert product_shapes(TINY) == [(32, 16), (16, 16), (48, 16), (16, 24)] * 2 + [(128, 16)]


def test_flops_are_those_that_torch_counts():
    products = product_arms(TINY, tokens=10, dtype=torch.float32)["the same by torch.mm"]
    with FlopCounterMode(display=False) as counter:
        products()
    assert product_flops(TINY, tokens=10) == counter.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_takes_the_products_of_every_linear(monkeypatch, dtype):
    taken = []
    monkeypatch.setattr(ops, "linear_output", lambda x, w: taken.append(("y", *w.shape)))
    monkeypatch.setattr(ops, "linear_input_gradient", lambda dy, w: taken.append(("dx", *w.shape)))
    monkeypatch.setattr(ops, "linear_weight_gradient", lambda dy, x: taken.append(("dw", dy.shape[1], x.shape[1])))
    product_arms(TINY, tokens=4, dtype=dtype)["matrix products alone"]()
    assert taken == [(kind, *shape) for shape in product_shapes(TINY) for kind in ("y", "dx", "dw")]
