"""Steps inside megatron-core's modules: a linear's matrix product, a model's outputs, scaled rotary frequencies."""

from typing import Any, TypeVar

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

Module = TypeVar("Module", bound=type)


def multiplies(linear: Module) -> Module:
    """Make a subclass of megatron-core's column- or row-parallel linear compute by its own `multiply` (a decorator).

    `multiply` gets its arguments by name: input, weight, bias, allreduce_dgrad, sequence_parallel, tp_group, and more.
    """
    changed: Any = linear
    changed._forward_impl = changed.multiply  # only `forward` calls it (megatron-core 0.16.1)
    return linear


def computes_outputs(model: Module) -> Module:
    """Make a subclass of megatron-core's GPTModel compute its outputs by its own `outputs` (a class decorator).

    `outputs` gets its arguments by name: hidden_states (those of the last layer), labels, and more.
    """
    changed: Any = model
    changed._postprocess = changed.outputs  # only `forward` calls it (megatron-core 0.16.1)
    return model


def scaled_frequencies(
    rotary: RotaryEmbedding, factor: float, low_freq_factor: float, high_freq_factor: float, original_length: int
) -> Tensor:
    """Return the inverse frequencies [d / 2] of a rotary embedding after Llama-3's scaling."""
    # The constructor of RotaryEmbedding takes only the factor (megatron-core 0.16.1).
    return rotary._apply_scaling(
        rotary.inv_freq,
        factor=factor,
        low_freq_factor=low_freq_factor,
        high_freq_factor=high_freq_factor,
        original_max_position_embeddings=original_length,
    )
