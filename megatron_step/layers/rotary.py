"""The rotary embedding's cosines and sines (RoPE, Su et al., 2021), with Llama-3's scaling."""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding as MegatronRotaryEmbedding
from torch import Tensor

from megatron_step.config.model import ModelConfig
from megatron_step.engine.compat.models import scaled_frequencies


class ScaledRotaryEmbedding(MegatronRotaryEmbedding):
    """megatron-core's rotary embedding with all parameters of Llama-3's scaling."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig, device: torch.device, cp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(
            kv_channels=config.attention_head_size,
            rotary_percent=1.0,
            rotary_base=config.rope_theta,
            use_cpu_initialization=True,
            cp_group=cp_group,
        )
        scaling = config.rope_scaling
        if scaling.factor > 1.0:
            self.inv_freq = scaled_frequencies(
                self, scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position
            )
        self.inv_freq = self.inv_freq.to(device)


class RotaryEmbedding(ScaledRotaryEmbedding):
    """Rotary embedding that returns cosines and sines, and computes them once."""

    _cosine_sine: Tensor | None = None

    def forward(self, max_seq_len: int, **unused: Any) -> Tensor:
        """Return the cosine and the sine of every position and channel, [2, s, d] in fp32."""
        if self._cosine_sine is None or self._cosine_sine.shape[1] != max_seq_len:
            angles = self.get_freqs_non_repeated(max_seq_len)  # [s, d / 2]
            angles = torch.cat((angles, angles), dim=-1)
            self._cosine_sine = torch.stack((angles.cos(), angles.sin()))
        return self._cosine_sine
