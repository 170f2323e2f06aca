"""Operations of a training step that are slow in torch, each with a plain-torch reference.

An operation is a pure function with autograd. If the C++ extension (csrc/) is built, it computes float32 and bfloat16
tensors on the CPU; built for CUDA, it also computes an adapter's linear on a GPU. In all other cases torch computes.
``backend`` returns what computes on a device.
"""

from megatron_step.ops.adapter_dropout import AdapterDropout, dropout_mask
from megatron_step.ops.adapter_linear import (
    adapter_input_gradient,
    adapter_linear,
    adapter_output,
    adapter_output_gradients,
    adapter_shrink,
    adapter_shrink_gradient,
)
from megatron_step.ops.attention import attention
from megatron_step.ops.compact_adamw import (
    AdamWStep,
    CompactStates,
    Rectangle,
    compact_adamw_,
    compact_adamw_peaks,
)
from megatron_step.ops.dispatch import backend, extension_available
from megatron_step.ops.embedding import embedding
from megatron_step.ops.linear import linear, linear_input_gradient, linear_output, linear_weight_gradient
from megatron_step.ops.linear_cross_entropy import linear_cross_entropy
from megatron_step.ops.main_weight import join_main, split_main_
from megatron_step.ops.rms_norm import rms_norm
from megatron_step.ops.rotary import rotary, split_qkv_rotary
from megatron_step.ops.swiglu import swiglu

__all__ = [
    "AdamWStep",
    "AdapterDropout",
    "CompactStates",
    "Rectangle",
    "adapter_input_gradient",
    "adapter_linear",
    "adapter_output",
    "adapter_output_gradients",
    "adapter_shrink",
    "adapter_shrink_gradient",
    "attention",
    "backend",
    "compact_adamw_",
    "compact_adamw_peaks",
    "dropout_mask",
    "embedding",
    "extension_available",
    "join_main",
    "linear",
    "linear_cross_entropy",
    "linear_input_gradient",
    "linear_output",
    "linear_weight_gradient",
    "rms_norm",
    "rotary",
    "split_main_",
    "split_qkv_rotary",
    "swiglu",
]
