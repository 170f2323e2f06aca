"""Steps inside megatron-core's modules: the product of a linear, a model's outputs, scaled rotary frequencies."""

from typing import Any, TypeVar

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

Module = TypeVar("Module", bound=type)


def multiplies(linear: Module) -> Module:
    """Class decorator: megatron-core's column- or row-parallel linear computes by the class's own `multiply`.

    Its arguments come by name: input, weight, bias, allreduce_dgrad, sequence_parallel, tp_group, and more.
    """
    changed: Any = linear
    changed._forward_impl = changed.multiply  # only `forward` calls it (megatron-core 0.16.1)
    return linear


def computes_outputs(model: Module) -> Module:
    """Class decorator: megatron-core's GPTModel goes from the last hidden states on by the class's own `outputs`.

    Its arguments come by name: hidden_states, labels, and more.
    """
    changed: Any = model
    changed._postprocess = changed.outputs  # only `forward` calls it (megatron-core 0.16.1)
    return model


def scaled_frequencies(
    rotary: RotaryEmbedding, factor: float, low_freq_factor: float, high_freq_factor: float, original_length: int
) -> Tensor:
    """The inverse frequencies [d / 2] of a rotary embedding, after Llama-3's scaling."""
    # Its constructor takes the factor alone (megatron-core 0.16.1).
    return rotary._apply_scaling(
        rotary.inv_freq,
        factor=factor,
        low_freq_factor=low_freq_factor,
        high_freq_factor=high_freq_factor,
        original_max_position_embeddings=original_length,
    )
