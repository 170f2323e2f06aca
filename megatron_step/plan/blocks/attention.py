"""Costs of a layer's self-attention and the norm before it: qkv, rotary embedding, softmax(q k^T) v, projection."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from megatron_step.config.stages import Target
from megatron_step.plan.blocks.core_attention import Core, CoreAttention
from megatron_step.plan.blocks.linear import Linear, LinearCosts
from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.norm import Norm
from megatron_step.plan.blocks.tape import BlockCosts, Tape
from megatron_step.plan.names import ATTENTION_NORM, KEY_NORM, PROJ, QKV, QUERY_NORM


@dataclass(frozen=True)
class Attention:
    """The sizes of a self-attention: n query heads over g groups of keys and values, each head of width d."""

    hidden: int
    """Width of the residual stream."""
    heads: int
    """Number of query heads, n."""
    groups: int
    """Number of query groups, g."""
    head_size: int
    """Width of a head, d."""
    seq_length: int
    """Tokens of a sequence."""
    qkv_bias: bool
    """Whether query, key and value projections have a bias."""
    qk_norm: bool
    """Whether queries and keys are normalised per head."""

    @cached_property
    def norm(self) -> Norm:
        """The norm before the attention."""
        return Norm(ATTENTION_NORM, self.hidden)

    @cached_property
    def qkv(self) -> Linear:
        """The fused projection to queries, keys and values."""
        return Linear(QKV, (self.heads + 2 * self.groups) * self.head_size, self.hidden, True, self.qkv_bias)

    @cached_property
    def proj(self) -> Linear:
        """The output projection."""
        return Linear(PROJ, self.hidden, self.heads * self.head_size, False)

    @cached_property
    def core(self) -> Core:
        """The core attention, softmax(q k^T) v."""
        return Core(self.heads, self.groups, self.head_size, self.seq_length, self.qk_norm)

    def linears(self) -> dict[Target, Linear]:
        """Return the attention's linears by target."""
        return {"qkv": self.qkv, "proj": self.proj}

    def costs(
        self,
        batch: Microbatch,
        linears: Mapping[Target, LinearCosts],
        core: CoreAttention,
        recomputes_core: bool,
    ) -> BlockCosts:
        """Return the costs of the attention and its norm; `linears` are the costs of the attention's linears.

        The backward pass runs from the gradient of the output in the residual stream to the gradient of the normalised
        input.
        """
        norm, qkv, proj = self.norm.costs(batch), linears["qkv"], linears["proj"]
        queries, inputs = self.core.queries(batch), self._core_inputs(batch)
        # The core's output is the input of the projection.
        context = queries if proj.input_bytes or (core.keeps_output and not recomputes_core) else 0
        core_kept = 0 if recomputes_core else core.kept
        kept = norm.kept + qkv.kept + inputs + context + core_kept + proj.adapter_bytes
        tape, gradients = Tape(), queries + 2 * self.core.keys(batch)  # of queries, keys and values
        tape.follow(proj.backward)
        tape.free(proj.adapter_bytes)
        if recomputes_core:
            tape.take(core.forward)
            tape.free(core.forward)
            core_kept = core.kept + queries  # the core's output takes as many bytes as the queries
            tape.take(core_kept)
        tape.take(core.backward)
        tape.free(core.backward)
        tape.take(gradients)
        tape.free(core_kept, inputs, context, queries)
        tape.take(inputs)  # gradients from the rotary embedding, and from the norms of queries and keys
        tape.free(gradients)
        tape.follow(qkv.backward)
        head_norms = (*Norm(QUERY_NORM, self.head_size).weights, *Norm(KEY_NORM, self.head_size).weights)
        weights = (*norm.weights, *proj.weights, *qkv.weights, *(head_norms if self.qk_norm else ()))
        return BlockCosts(weights, kept, tape)

    def _core_inputs(self, batch: Microbatch) -> int:
        """Return the kept bytes of queries, keys and values; if normed, also those before the norms, and the scales."""
        queries, keys = self.core.queries(batch), self.core.keys(batch)
        if not self.qk_norm:
            return queries + 2 * keys
        is_grouped = self.groups // batch.tensor > 1 and self.groups < self.heads
        copied = queries if is_grouped else 0  # the queries of several groups are not contiguous, so they are copied
        scales = 4 * batch.tokens * (self.heads + self.groups) // batch.tensor
        return queries + 2 * keys + copied + scales + queries + keys
