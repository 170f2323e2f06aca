"""Model sizes of the Llama family to start from, with batch size and learning rate."""

from dataclasses import dataclass

from megatron_step.config.model import ModelConfig


@dataclass(frozen=True)
class Size:
    """A model, and the batch size and learning rate that are usual for it."""

    model: ModelConfig
    """The shape; its `vocab_size` is not None."""
    global_batch_size: int
    """Samples of one step on GPUs."""
    learning_rate: float
    """Peak learning rate."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary."""
        assert self.model.vocab_size is not None
        return self.model.vocab_size

    @property
    def parameters(self) -> int:
        """Number of weights in the model, without norms."""
        model = self.model
        attention = 2 * model.hidden_size * model.attention_head_size * (model.num_attention_heads + model.query_groups)
        layer = attention + 3 * model.hidden_size * model.ffn_hidden_size
        return model.num_layers * layer + 2 * self.vocab_size * model.hidden_size


def _size(
    layers: int, hidden: int, ffn: int, heads: int, groups: int | None, seq: int, vocab: int, batch: int, rate: float
) -> Size:
    shape = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        seq_length=seq,
        vocab_size=vocab,
    )
    return Size(shape, batch, rate)


SIZES = {
    "2m": _size(4, 128, 352, 4, None, 128, 4096, 8, 2e-3),
    "10m": _size(6, 288, 768, 6, None, 256, 8192, 16, 1e-3),
    "125m": _size(12, 768, 2048, 12, None, 2048, 32000, 256, 6e-4),
    "350m": _size(24, 1024, 2736, 16, None, 2048, 32000, 256, 5e-4),
    "1.3b": _size(24, 2048, 5504, 16, None, 2048, 32000, 512, 4e-4),
    "3b": _size(28, 3072, 8192, 24, 8, 4096, 32000, 512, 3e-4),
    "7b": _size(32, 4096, 11008, 32, None, 4096, 32000, 1024, 3e-4),
    "13b": _size(40, 5120, 13824, 40, None, 4096, 32000, 1024, 3e-4),
    "70b": _size(80, 8192, 28672, 64, 8, 4096, 32000, 1024, 1.5e-4),
}
"""Sizes by name; the two smallest train on a laptop's CPU."""
