"""Bytes that a training step needs beside the model states, by what the layers keep for their backward pass.

With T tokens of a micro-batch on t tensor-parallel ranks, e bytes an element, R = e T h of the residual stream (over t
with sequence parallelism), Q = e T n d / t of the queries, K = e T g d / t of the keys, U = e T f / t of an ffn vector
and G = 2 U of gate and up (GELU: U), a layer keeps

    two norms    R + 4 T each (over t)          attention    2 Q + 2 K + A              activation   G
    qkv, fc1     R if trained or adapted        fc2          U if trained or adapted
    an adapter's u    4 T r, over t where the linear is split by columns

and proj the attention's output, which is counted there; A is the core attention's (plan/blocks/core_attention.py). The
last pipeline rank keeps its logits once, e T v / t. The backward pass is followed event by event: each gradient is
taken when an operation makes it and freed with what the operation had kept after its last use; the peak is the most
that is in use at once. A layer that is recomputed keeps its input, and all else only in its own backward pass.

The blocks (plan/blocks) count each part of a model; this file puts them together for a rank. The operations counted are
those of layers/ and ops/ on the kernels of csrc/; the plain-torch fallbacks keep more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_step.plan.blocks.tape import Use
from megatron_step.plan.names import EMBEDDING
from megatron_step.plan.parameters import HeldChunk, layer_handling
from megatron_step.plan.resolved import ResolvedConfig
from megatron_step.plan.stages import Stage
from megatron_step.plan.trainable import treatment
from megatron_step.planner.costs.pipeline_schedule import held_messages, passes


def activation_bytes(resolved: ResolvedConfig, stage: Stage, chunks: Sequence[HeldChunk]) -> int:
    """Return the most that a step of full global batches needs at once beside the model states.

    `chunks` are those of one pipeline rank.
    """
    parallel, microbatches, pp_rank = resolved.config.parallel, resolved.num_microbatches, chunks[0].chunk.pp_rank
    uses = [_chunk_use(resolved, stage, chunk) for chunk in chunks]
    peak = live = between_passes(resolved, pp_rank)
    for vp_stage, is_forward in passes(parallel, microbatches, pp_rank):
        if is_forward:
            live += uses[vp_stage].kept
        else:
            live -= uses[vp_stage].kept
            peak = max(peak, live + uses[vp_stage].backward)
    return peak


def between_passes(resolved: ResolvedConfig, pp_rank: int) -> int:
    """Return the bytes in use on a pipeline rank beside what passes keep: messages, buffers, numbers such as losses."""
    batch, blocks = resolved.batch, resolved.blocks
    # The backend frees what tensor-parallel ranks exchange a little late, once it has noticed the end.
    exchanged = blocks.layer.whole_stream(batch) if batch.tensor > 1 else 0
    messages = held_messages(resolved.config.parallel, resolved.num_microbatches, pp_rank)
    keeps_scores = resolved.config.planner.attention == "unfused"
    scores = blocks.layer.attention.core.shared_buffer(batch) if keeps_scores else 0
    return messages * blocks.layer.stream(batch) + exchanged + scores + _SCALARS_BYTES


_SCALARS_BYTES = 4096


def layer_use(resolved: ResolvedConfig, stage: Stage, layer: int) -> Use:
    """Return the bytes of a micro-batch in a layer, by which matrices are trained and which have adapters."""
    batch, block, recompute = resolved.batch, resolved.blocks.layer, resolved.config.parallel.recompute
    use = block.use(batch, layer_handling(resolved, stage, layer), resolved.core, recompute == "selective")
    if recompute == "full":
        stream = block.stream(batch)
        return Use(stream, use.backward + stream)  # the layer and its output are computed again
    return use


@dataclass(frozen=True)
class ChunkEnds:
    """Bytes of one micro-batch in what a model chunk has beside its layers."""

    below: int
    """Bytes kept from the forward to the backward pass: the output sent on, and what the embedding keeps."""
    under_top: int
    """Bytes added once the backward pass of the topmost block is over."""
    embedding_backward: int
    """The most in the embedding's backward pass, with all that is kept then."""
    head: Use | None
    """The final norm, the output layer and the loss, where the chunk holds them."""


def chunk_ends(resolved: ResolvedConfig, stage: Stage, *, first: bool, last: bool) -> ChunkEnds:
    """Return the ends of a chunk that is or is not the `first` of the model, and the `last`."""
    batch, embedding, head = resolved.batch, resolved.blocks.embedding, resolved.blocks.head
    embedding_trained = treatment(EMBEDDING, stage, resolved.config).trained
    # Another rank's chunk has this chunk's output until its gradient comes back, which stays to the end as well.
    sent = 0 if last else resolved.blocks.layer.stream(batch)
    # The output layer's gradient of a tied weight waits for the embedding's gradient; then their sum is there, too.
    waits = first and last and head.tied and embedding_trained
    waiting = embedding.gradient(batch) if waits else 0
    return ChunkEnds(
        below=sent + (embedding.kept(batch) if first else 0),
        under_top=waiting + sent,
        embedding_backward=2 * sent + 2 * waiting + embedding.backward(batch) if first and embedding_trained else 0,
        head=head.use(batch, treatment(head.output_key, stage, resolved.config).trained) if last else None,
    )


def _chunk_use(resolved: ResolvedConfig, stage: Stage, held: HeldChunk) -> Use:
    ends = chunk_ends(resolved, stage, first=held.chunk.is_first, last=held.chunk.is_last)
    blocks: list[Use] = []
    flows = not held.chunk.is_first or treatment(EMBEDDING, stage, resolved.config).trained
    flows = flows or resolved.config.parallel.recompute == "full"
    for layer, parameters in held.layers.items():
        # Below the first trained weight nothing has a gradient, and nothing is kept.
        flows = flows or any(parameter.treatment.trained for parameter in parameters)
        if flows:
            blocks.append(layer_use(resolved, stage, layer))
    blocks += [ends.head] if ends.head else []
    peak = kept = ends.below
    for index, block in enumerate(blocks):
        is_top = index == len(blocks) - 1  # its backward pass makes the bytes of `under_top`
        peak = max(peak, kept + block.backward + (0 if is_top else ends.under_top))
        kept += block.kept
    return Use(kept, max(peak, ends.embedding_backward))
