"""The MLP: gated, down(silu(gate(x)) * up(x)), or plain, down(gelu(up(x)))."""

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer import mlp as megatron_mlp
from torch import Tensor

from megatron_step import ops
from megatron_step.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_step.plan.names import ADAPTER_B


class MLP(megatron_mlp.MLP):
    """megatron-core's MLP with SwiGLU (Shazeer, 2020) in one operation, or with GELU."""

    def __init__(self, config: TransformerConfig) -> None:
        submodules = megatron_mlp.MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size)

    def forward(self, hidden_states: Tensor, **unused: Any) -> tuple[Tensor, Tensor | None]:
        """Apply the MLP: hidden_states [s, b, h] -> output [s, b, h] and its bias."""
        up, _ = self.linear_fc1(hidden_states)  # [s, b, f / t], or gate and up [s, b, 2 f / t]
        return self.linear_fc2(ops.swiglu(up) if self.config.gated_linear_unit else F.gelu(up))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return megatron-core's sharded tensors, with an adapter's B split into gate and up like its base weight."""
        shards = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        key = f"{prefix}linear_fc1.{ADAPTER_B}"
        if self.config.gated_linear_unit and key in shards:
            shards[key] = megatron_mlp.apply_swiglu_sharded_factory(shards[key], sharded_offsets)
        return shards
