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

from megatron_step.plan.blocks.microbatch import Microbatch


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


@dataclass(frozen=True)
class Core:
    """A core attention of plain numbers: n heads over g groups, on sequences of s tokens."""

    heads: int
    """n."""
    groups: int
    """g."""
    head_size: int
    """Width of a head."""
    seq_length: int
    """s."""
    normed: bool
    """Whether queries and keys are normalised, so that they are kept anyway."""

    def queries(self, batch: Microbatch) -> int:
        """Bytes of the queries on a rank: Q."""
        return batch.split(self.heads * self.head_size)

    def keys(self, batch: Microbatch) -> int:
        """Bytes of the keys, or of the values, on a rank: K."""
        return batch.split(self.groups * self.head_size)

    def linear(self, batch: Microbatch) -> CoreAttention:
        """Bytes of one that keeps no scores."""
        queries, logsumexp = self.queries(batch), 4 * batch.tokens * self.heads // batch.tensor
        backward = queries + 2 * self.keys(batch)
        return CoreAttention(logsumexp, keeps_output=True, forward=logsumexp + queries, backward=backward)

    def unfused(self, batch: Microbatch, recomputed: bool) -> CoreAttention:
        """Bytes of one that keeps every score; `recomputed` says whether it is computed again in the backward pass."""
        queries, scores, mask = self.queries(batch), self._scores(batch), self.seq_length**2
        # Keys and values of every head are kept in place of those of the groups, which the norms may need anyway.
        grouped = self.groups < self.heads
        repeated = 2 * queries if grouped else 0
        replaced = (1 if self.normed else 2) * self.keys(batch) if grouped and not recomputed else 0
        if batch.element_bytes == 2:
            # Scores in bf16 and in fp32, their softmax in both. Back: the softmax in fp32, the gradients before and
            # after.
            softmax, forward, backward = 6 * scores, 12 * scores, 6 * scores
        else:
            # Scores and softmax. Back, where scores were masked in place: their gradient four times, the softmax gone.
            softmax, forward, backward = 4 * scores, 8 * scores, 12 * scores
        kept = softmax + mask + repeated - replaced
        return CoreAttention(kept, keeps_output=False, forward=forward + mask + repeated, backward=backward + queries)

    def shared_buffer(self, batch: Microbatch) -> int:
        """Bytes that all layers share for as long as the process lives: megatron-core's buffer under the scores."""
        return batch.element_bytes * self._scores(batch)

    def flops(self) -> int:
        """Operations of q k^T and of the scores times v, forward, for a token, which sees half of the sequence on
        average."""
        return 2 * self.heads * self.head_size * (self.seq_length + 1)

    def _scores(self, batch: Microbatch) -> int:
        """S; a count."""
        return batch.tokens * self.seq_length * self.heads // batch.tensor
