"""The gated MLP: down(silu(gate(x)) * up(x))."""

from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer import mlp as megatron_mlp
from torch import Tensor

from megatron_step import ops
from megatron_step.layers.linear import ColumnParallelLinear, RowParallelLinear


class MLP(megatron_mlp.MLP):
    """megatron-core's MLP with SwiGLU (Shazeer, 2020) in one operation."""

    def __init__(self, config: TransformerConfig) -> None:
        submodules = megatron_mlp.MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size)

    def forward(self, hidden_states: Tensor, **unused: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] -> output [s, b, h] and its bias."""
        gate_up, _ = self.linear_fc1(hidden_states)  # [s, b, 2 f / t]
        return self.linear_fc2(ops.swiglu(gate_up))
