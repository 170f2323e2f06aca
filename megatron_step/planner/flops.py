"""Floating-point operations of training, by arithmetic."""

from megatron_step.config.model import ModelConfig


def forward_flops_per_token(model: ModelConfig, vocab_size: int) -> int:
    """Floating-point operations of the forward pass for one token of a full sequence.

    A product of an [m, k] with a [k, n] matrix takes 2 m k n operations. Counted are the matrix products of the
    linears, of attention over the causal half of the scores, and of the output layer (Narayanan et al., 2021, appendix;
    their formula counts both halves of the scores).
    """
    head = model.attention_head_size
    qkv = model.hidden_size * (model.num_attention_heads + 2 * model.query_groups) * head
    projection = model.num_attention_heads * head * model.hidden_size
    mlp = 3 * model.hidden_size * model.ffn_hidden_size
    # q k^T and scores times v: a token sees half of the sequence on average.
    scores = model.num_attention_heads * head * (model.seq_length + 1)
    output = model.hidden_size * vocab_size
    return 2 * (model.num_layers * (qkv + projection + mlp) + output) + 2 * model.num_layers * scores


def training_flops_per_token(model: ModelConfig, vocab_size: int) -> int:
    """Operations of the forward and backward pass for one token: the backward pass takes twice the forward's.

    Recomputed activations are not counted: they are no progress.
    """
    return 3 * forward_flops_per_token(model, vocab_size)
