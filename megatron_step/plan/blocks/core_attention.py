"""Bytes that a layer's core attention, softmax(q k^T) v, keeps for its backward pass and needs during it.

A micro-batch has T tokens in sequences of s tokens. The n heads over g groups are split over t tensor-parallel ranks,
with e bytes per element. Q and K are the bytes of queries and keys, and S = T s n / t is the number of a layer's scores
(B s^2 n / t for B samples).

    planner.attention   bytes kept beside q, k, v and the output              linear in the sequence length
    sdpa                the scores' logsumexp, 4 T n / t                      yes (FlashAttention, Dao, 2023)
    unfused             softmax 4 S, in bf16 its copy 2 S; the mask s^2;      no
                        with n > g keys and values for every head, 2 Q

`unfused` is megatron-core's local DotProductAttention (megatron/core/transformer/dot_product_attention.py, 0.16.1) with
torch's softmax in fp32. The model has no dropout there. Korthikanti et al., 2022, count 5 S in 16 bits: 2 S for the
softmax, 2 S for dropout's output and S for dropout's mask. With apex's fused softmax only 2 S of the 6 S are kept.
"""

from dataclasses import dataclass

from megatron_step.plan.blocks.microbatch import Microbatch


@dataclass(frozen=True)
class CoreAttention:
    """Bytes of one micro-batch in a layer's core attention, on a rank."""

    kept: int
    """Bytes kept from the forward to the backward pass, beside q, k, v and the output."""
    keeps_output: bool
    """Whether the backward pass needs the output."""
    forward: int
    """Most bytes in use during the forward pass beside q, k and v; the output and the kept bytes are included."""
    backward: int
    """Most bytes in use during the backward pass beside q, k, v, the output, the output's gradient and `kept`."""


@dataclass(frozen=True)
class Core:
    """The sizes of a core attention: n heads over g groups, on sequences of s tokens."""

    heads: int
    """Number of query heads, n."""
    groups: int
    """Number of query groups, g."""
    head_size: int
    """Width of a head."""
    seq_length: int
    """Tokens of a sequence, s."""
    normed: bool
    """Whether queries and keys are normalised, so that their values before the norms are kept anyway."""

    def queries(self, batch: Microbatch) -> int:
        """Return the bytes of the queries on a rank, Q."""
        return batch.split(self.heads * self.head_size)

    def keys(self, batch: Microbatch) -> int:
        """Return the bytes of the keys, or of the values, on a rank, K."""
        return batch.split(self.groups * self.head_size)

    def linear(self, batch: Microbatch) -> CoreAttention:
        """Return the bytes of an attention that keeps no scores (`planner.attention` sdpa)."""
        queries, logsumexp = self.queries(batch), 4 * batch.tokens * self.heads // batch.tensor
        backward = queries + 2 * self.keys(batch)
        return CoreAttention(logsumexp, keeps_output=True, forward=logsumexp + queries, backward=backward)

    def unfused(self, batch: Microbatch, recomputed: bool) -> CoreAttention:
        """Return the bytes of an attention that keeps every score (`planner.attention` unfused).

        `recomputed` says whether the backward pass computes the attention again.
        """
        queries, scores, mask = self.queries(batch), self._scores(batch), self.seq_length**2
        # Keys and values, repeated for every head, are kept in place of those of the groups. Norms keep the groups'
        # keys anyway.
        grouped = self.groups < self.heads
        repeated = 2 * queries if grouped else 0
        replaced = (1 if self.normed else 2) * self.keys(batch) if grouped and not recomputed else 0
        if batch.element_bytes == 2:
            # Forward: the scores and their softmax, each in bf16 and in fp32. Backward: the softmax in fp32, and the
            # gradients before and after it.
            softmax, forward, backward = 6 * scores, 12 * scores, 6 * scores
        else:
            # Forward: the scores and their softmax. Backward: four copies of the scores' gradient, because the scores
            # were masked in place, while the softmax is already freed.
            softmax, forward, backward = 4 * scores, 8 * scores, 12 * scores
        kept = softmax + mask + repeated - replaced
        return CoreAttention(kept, keeps_output=False, forward=forward + mask + repeated, backward=backward + queries)

    def shared_buffer(self, batch: Microbatch) -> int:
        """Return the bytes of megatron-core's buffer for the scores, which all layers share and the process keeps."""
        return batch.element_bytes * self._scores(batch)

    def flops(self) -> int:
        """Return the operations per token of q k^T and of the scores times v in the forward pass.

        A token sees half of the sequence on average.
        """
        return 2 * self.heads * self.head_size * (self.seq_length + 1)

    def _scores(self, batch: Microbatch) -> int:
        """Return the number of scores of a layer on a rank, S."""
        return batch.tokens * self.seq_length * self.heads // batch.tensor
