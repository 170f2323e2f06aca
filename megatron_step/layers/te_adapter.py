"""Adapters on TransformerEngine's linears, with the interface of ours: `split`, `weight` and `adapter`.

TransformerEngine computes the linear's output Y, and the adapter's output is added to it:

    column:  Y_i += s gather(drop(X) A_i^T) B_i^T        X is the norm's output, where the norm is part of the linear
    row:     Y   += s sum_i(scatter(drop(X_i) A_i^T) B_i^T)

`gather` and `scatter` run over the adapter's rank, as in `adapter.py`.
"""

from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_step import ops
from megatron_step.layers.adapter import AdaptableLinear, Adapter, Split
from megatron_step.plan.names import ADAPTER_A, ADAPTER_B


def make_adaptable(linear: Any, sequence_parallel: bool) -> AdaptableLinear:
    """Make a TransformerEngine linear able to hold an adapter, in place; our own linears already are.

    Raises TypeError for any other module.
    """
    if hasattr(linear, "split"):
        return linear
    row = getattr(linear, "parallel_mode", None) == "row"
    if not row and getattr(linear, "parallel_mode", None) != "column":
        raise TypeError(f"{type(linear).__name__} cannot hold an adapter: it is not a tensor-parallel linear")
    linear.register_module("adapter", None)
    linear.split = "row" if row else "column"
    linear.gathers_sequence = sequence_parallel
    # The class changes, so that the module and the names of its weights stay.
    linear.__class__ = type(f"Adapted{type(linear).__name__}", (_AdaptedLinear, type(linear)), {})
    return linear


class _AdaptedLinear:
    """Base class that adds an adapter to a TransformerEngine linear, which must be the next base."""

    adapter: Adapter | None
    split: Split
    gathers_sequence: bool
    return_layernorm_output: bool

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Apply the adapted linear: x [s, b, k] -> [s, b, n], and the bias that the caller adds."""
        if self.adapter is None:
            return super().forward(x)  # type: ignore[misc]
        has_norm = hasattr(self, "layer_norm_weight")
        if not has_norm:
            y, bias = super().forward(x)  # type: ignore[misc]
            return y + adapter_branch(x, self.adapter, self.gathers_sequence), bias
        self.return_layernorm_output = True
        outputs = super().forward(x)  # type: ignore[misc]
        # Without a bias to return: (y, normed), None. With one: y, bias, normed.
        (y, normed), bias = outputs if len(outputs) == 2 else ((outputs[0], outputs[2]), outputs[1])
        return y + adapter_branch(normed, self.adapter, self.gathers_sequence), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Return TransformerEngine's sharded tensors, with A and B split as `adapter.py` says."""
        shards = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        if self.adapter is None:
            return shards
        factors = {ADAPTER_A: self.adapter.linear_in.weight, ADAPTER_B: self.adapter.linear_out.weight}
        axis = 0 if self.split == "column" else 1
        return shards | make_sharded_tensors_for_checkpoint(
            factors,
            prefix,
            dict.fromkeys(factors, axis),
            sharded_offsets,
            tp_group=self.adapter.group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def adapter_branch(x: Tensor, adapter: Adapter, sequence_parallel: bool) -> Tensor:
    """Compute the adapter's output, with autograd, in the layout of its linear's output."""
    group, column = adapter.group, adapter.split == "column"
    if column and sequence_parallel:
        x = mappings.gather_from_sequence_parallel_region(x, group=group)
    elif column:
        x = mappings.copy_to_tensor_model_parallel_region(x, group=group)
    dropout = adapter.draw_dropout()
    dropped = x if dropout is None else x * ops.dropout_mask(x.shape, dropout, x.device).to(x.dtype)
    u = F.linear(dropped, adapter.linear_in.weight)
    if column:
        u = mappings.all_gather_last_dim_from_tensor_parallel_region(u, group=group)
        return F.linear(u, adapter.linear_out.weight) * adapter.scaling
    u = mappings.reduce_scatter_last_dim_to_tensor_parallel_region(u, group=group)
    partial = F.linear(u, adapter.linear_out.weight) * adapter.scaling
    if sequence_parallel:
        return mappings.reduce_scatter_to_sequence_parallel_region(partial, group=group)
    return mappings.reduce_from_tensor_model_parallel_region(partial, group=group)
