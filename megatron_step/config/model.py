"""The shape of the model: a decoder-only transformer of the Llama family."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_step.config.numbers import check_finite, nearest, remedy


@dataclass(frozen=True)
class RopeScalingConfig:
    """Llama-3 frequency scaling of the rotary embedding (Llama 3.1 model card, "rope_type: llama3")."""

    factor: float = 1.0
    """Factor by which low frequencies are divided; 1 leaves the rotary embedding as it is."""
    low_freq_factor: float = 1.0
    """Wavelengths longer than original_max_position / low_freq_factor are divided by `factor`."""
    high_freq_factor: float = 4.0
    """Wavelengths shorter than original_max_position / high_freq_factor are kept."""
    original_max_position: int = 8192
    """Context length, in tokens, that the unscaled embedding was trained for."""

    def __post_init__(self) -> None:
        check_finite("model.rope_scaling", self)
        if self.factor < 1.0:
            raise ValueError(f"model.rope_scaling.factor must be at least 1, not {self.factor}")
        if not 0.0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"model.rope_scaling.low_freq_factor {self.low_freq_factor} must be positive and below "
                f"high_freq_factor {self.high_freq_factor}"
            )
        if self.original_max_position < 1:
            raise ValueError(
                f"model.rope_scaling.original_max_position must be at least 1 token, not {self.original_max_position}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of the architecture (RMSNorm, SwiGLU, RoPE, grouped-query attention)."""

    num_layers: int
    """Number of transformer layers after the last stage."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the MLP. In a gated MLP the gate and the up projection each have this width."""
    num_attention_heads: int
    """Query heads of a layer."""
    seq_length: int
    """Tokens of one training sample."""
    max_position_embeddings: int | None = None
    """Context length in tokens that an export states; null for seq_length. Training does not use it."""
    num_query_groups: int | None = None
    """Key and value heads of a layer; null for num_attention_heads."""
    head_size: int | None = None
    """Width of one head; null for hidden_size / num_attention_heads."""
    vocab_size: int | None = None
    """Tokens of the vocabulary; null takes the tokenizer's number."""
    vocab_size_multiple: int = 128
    """The rows of the embedding are padded to a multiple of this number, in every layout."""
    tie_embeddings: bool = False
    """Whether the output layer uses the weight of the input embedding."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Kind of the MLP: swiglu is gated, down(silu(gate x) * up x); gelu is plain, down(gelu(up x))."""
    qkv_bias: bool = False
    """Whether the query, key and value projections have a bias (Qwen2)."""
    qk_norm: bool = False
    """Whether queries and keys are normalised per head (Qwen3)."""
    norm_epsilon: float = 1.0e-5
    """Number that RMSNorm adds to the mean square."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    """Llama-3 scaling of the rotary embedding."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; output projections get init_std / sqrt(2 num_layers)."""

    def __post_init__(self) -> None:
        check_finite("model", self)
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, not {getattr(self, name)}")
        if self.context_length < self.seq_length:
            raise ValueError(
                f"model.seq_length {self.seq_length} is longer than model.max_position_embeddings "
                f"{self.max_position_embeddings}: raise model.max_position_embeddings or lower model.seq_length"
            )
        if self.head_size is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size {self.hidden_size} is not divisible by model.num_attention_heads "
                f"{self.num_attention_heads}; {self._other_widths()}, or model.head_size to an even number"
            )
        if self.attention_head_size < 2 or self.attention_head_size % 2:
            other = remedy(("model.head_size", nearest(self.attention_head_size, lambda size: size % 2 == 0)))
            raise ValueError(
                f"the head size {self.attention_head_size} must be even, since RoPE rotates pairs of channels: {other}"
            )
        if self.query_groups < 1 or self.num_attention_heads % self.query_groups:
            raise ValueError(
                f"model.num_attention_heads {self.num_attention_heads} is not divisible by "
                f"model.num_query_groups {self.query_groups}: {self._other_groups()}"
            )
        if self.vocab_size is not None and self.vocab_size < 2:
            raise ValueError(f"model.vocab_size must be at least 2, not {self.vocab_size}")
        if self.vocab_size_multiple < 1:
            raise ValueError(f"model.vocab_size_multiple must be at least 1, not {self.vocab_size_multiple}")
        for name in ("norm_epsilon", "rope_theta", "init_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"model.{name} must be positive, not {getattr(self, name)}")

    def _other_widths(self) -> str:
        def fits(width: int, heads: int) -> bool:
            return width % (2 * heads) == 0

        return remedy(
            ("model.hidden_size", nearest(self.hidden_size, lambda width: fits(width, self.num_attention_heads))),
            ("model.num_attention_heads", nearest(self.num_attention_heads, lambda n: fits(self.hidden_size, n))),
        )

    def _other_groups(self) -> str:
        return remedy(
            ("model.num_query_groups", nearest(self.query_groups, lambda n: self.num_attention_heads % n == 0))
        )

    @property
    def context_length(self) -> int:
        """Largest number of tokens that the model is meant to read at once."""
        return self.seq_length if self.max_position_embeddings is None else self.max_position_embeddings

    @property
    def gated_mlp(self) -> bool:
        """Return whether the MLP has a gate beside the up projection."""
        return self.mlp == "swiglu"

    @property
    def query_groups(self) -> int:
        """Key and value heads of a layer."""
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def attention_head_size(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads if self.head_size is None else self.head_size

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Rows of the embedding for a vocabulary of `vocab_size` tokens."""
        multiple = self.vocab_size_multiple
        return (vocab_size + multiple - 1) // multiple * multiple
