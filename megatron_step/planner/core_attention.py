"""Bytes that a layer's core attention, softmax(q k^T) v, keeps for its backward pass and needs in it.

With T tokens of a micro-batch, sequences of s tokens, n heads over g groups on t tensor-parallel ranks, e bytes an
element, Q and K the queries and the keys, and S = T s n / t the scores of a layer (B s^2 n / t for B samples),

    planner.attention   beside q, k, v and the output it keeps                linear in the sequence
    sdpa                the scores' logsumexp, 4 T n / t                      yes (FlashAttention, Dao, 2023)
    unfused             softmax 4 S, in bf16 its copy 2 S; the mask s^2;      no
                        with n > g keys and values for every head, 2 Q

`unfused` is megatron-core's local DotProductAttention (megatron/core/transformer/dot_product_attention.py, 0.16.1) with
torch's softmax in fp32 and without dropout, which the model does not have. Korthikanti et al., 2022, count 5 S for it
in 16 bits: 2 for the softmax, 2 and 1 for dropout's output and mask. With apex's fused softmax 2 S of the 6 S are kept.
"""

from dataclasses import dataclass

from megatron_step.config.run import RunConfig
from megatron_step.plan.states import RECIPES


@dataclass(frozen=True)
class CoreAttention:
    """Bytes of one micro-batch in a layer's core attention, on a rank."""

    kept: int
    """From its forward to its backward pass, beside q, k, v and the output."""
    keeps_output: bool
    """Whether its backward pass needs the output."""
    forward: int
    """The most in its forward pass beside q, k and v, with what it keeps and the output."""
    backward: int
    """The most in its backward pass beside q, k, v, the output, its gradient and what was kept."""


def core_attention(config: RunConfig, queries: int, keys: int) -> CoreAttention:
    """The core attention on a tensor-parallel rank whose queries and keys take so many bytes."""
    model, tensor = config.model, config.parallel.tensor_parallel_size
    tokens = config.training.micro_batch_size * model.seq_length
    if config.planner.attention == "sdpa":
        logsumexp = 4 * tokens * model.num_attention_heads // tensor
        return CoreAttention(logsumexp, keeps_output=True, forward=logsumexp + queries, backward=queries + 2 * keys)
    scores, mask = _scores(config), model.seq_length**2
    # Keys and values of every head are kept in place of those of the groups, which the norms may need anyway.
    grouped = model.query_groups < model.num_attention_heads
    repeated = 2 * queries if grouped else 0
    replaced = (1 if model.qk_norm else 2) * keys if grouped and config.parallel.recompute != "selective" else 0
    if config.training.precision == "bf16":
        # Scores in bf16 and in fp32, their softmax in both. Back: the softmax in fp32, the gradients before and after.
        softmax, forward, backward = 6 * scores, 12 * scores, 6 * scores
    else:
        # Scores and softmax. Back, where scores were masked in place: their gradient four times, the softmax gone.
        softmax, forward, backward = 4 * scores, 8 * scores, 12 * scores
    kept = softmax + mask + repeated - replaced
    return CoreAttention(kept, keeps_output=False, forward=forward + mask + repeated, backward=backward + queries)


def attention_buffer(config: RunConfig) -> int:
    """Bytes that all layers share for as long as the process lives: megatron-core's buffer under the scores."""
    element = RECIPES[config.training.precision].weight.element_bytes
    return element * _scores(config) if config.planner.attention == "unfused" else 0


def _scores(config: RunConfig) -> int:
    """S; a count."""
    tokens = config.training.micro_batch_size * config.model.seq_length
    return tokens * config.model.seq_length * config.model.num_attention_heads // config.parallel.tensor_parallel_size
