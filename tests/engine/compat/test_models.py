"""megatron-core's modules call the product and the outputs of our classes, with the arguments that we use."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from small_run import VOCAB_SIZE, small_config
from torch import Tensor

from megatron_step.engine.compat.models import computes_outputs, multiplies, scaled_frequencies
from megatron_step.engine.parallel import Parallel
from megatron_step.model.build import build_model


@multiplies
class DoubledColumn(tensor_parallel.ColumnParallelLinear):
    def multiply(self, input: Tensor, weight: Tensor, bias: Tensor | None, **others: object) -> Tensor:
        self.others = others
        return 2 * F.linear(input, weight)


@multiplies
class DoubledRow(tensor_parallel.RowParallelLinear):
    def multiply(self, input: Tensor, weight: Tensor, bias: Tensor | None, **others: object) -> Tensor:
        self.others = others
        return 2 * F.linear(input, weight)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", [DoubledColumn, DoubledRow])
def test_a_linear_computes_by_its_own_multiply(alone: Parallel, kind: type, frozen: bool) -> None:
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, use_cpu_initialization=True)
    more = {} if kind is DoubledColumn else {"input_is_parallel": True, "skip_bias_add": False}
    linear = kind(4, 6, config=config, init_method=torch.nn.init.normal_, bias=False, tp_group=alone.groups.tp, **more)
    linear.weight.requires_grad_(not frozen)
    x = torch.randn(3, 2, 4)
    y, _ = linear(x)
    torch.testing.assert_close(y, 2 * F.linear(x, linear.weight))
    assert {"allreduce_dgrad", "sequence_parallel", "tp_group"} <= linear.others.keys()
    if kind is DoubledColumn:
        assert linear.others["tp_group"] is alone.groups.tp
        assert linear.others["allreduce_dgrad"] is linear.others["sequence_parallel"] is False


def test_a_model_computes_by_its_own_outputs(alone: Parallel) -> None:
    (chunk,) = build_model(small_config().model, VOCAB_SIZE, alone, "fp32", seed=1)

    @computes_outputs
    class Hidden(type(chunk)):
        def outputs(self, hidden_states: Tensor, labels: Tensor | None, **others: object) -> object:
            return hidden_states, labels

    chunk.__class__ = Hidden
    tokens = torch.arange(10).view(2, 5)
    hidden, labels = chunk(input_ids=tokens, position_ids=None, attention_mask=None, labels=tokens + 1)
    assert hidden.shape == (5, 2, 64)
    assert labels.equal(tokens + 1)


def test_short_waves_stay_and_long_ones_are_stretched(alone: Parallel) -> None:
    rotary = RotaryEmbedding(64, 1.0, use_cpu_initialization=True, cp_group=alone.groups.cp)
    plain = rotary.inv_freq.clone()
    scaled = scaled_frequencies(rotary, 8.0, 1.0, 4.0, 128)
    lengths = 2 * torch.pi / plain
    short, long = lengths < 128 / 4.0, lengths > 128 / 1.0
    assert short.any()
    assert long.any()
    torch.testing.assert_close(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8.0)
    between = ~short & ~long
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8.0).all()
