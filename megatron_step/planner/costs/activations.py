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

from megatron_step.plan.blocks.tape import Use
from megatron_step.plan.names import is_embedding
from megatron_step.plan.resolved import ResolvedConfig
from megatron_step.planner.costs.held import HeldChunk
from megatron_step.planner.costs.pipeline_schedule import held_messages, passes


def activation_bytes(resolved: ResolvedConfig, chunks: Sequence[HeldChunk]) -> int:
    """Return the most that a step of full global batches needs at once beside the model states.

    `chunks` are those of one pipeline rank.
    """
    parallel, microbatches, pp_rank = resolved.config.parallel, resolved.num_microbatches, chunks[0].chunk.pp_rank
    uses = [_chunk_use(resolved, held) for held in chunks]
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


def _chunk_use(resolved: ResolvedConfig, held: HeldChunk) -> Use:
    ends = held.outer.ends
    blocks: list[Use] = []
    embedding = (parameter for parameter in held.outer.parameters if is_embedding(parameter.key))
    flows = not held.chunk.is_first or any(parameter.treatment.trained for parameter in embedding)
    flows = flows or resolved.config.parallel.recompute == "full"
    for layer in held.layers.values():
        # Below the first trained weight nothing has a gradient, and nothing is kept.
        flows = flows or any(parameter.treatment.trained for parameter in layer.parameters)
        if flows:
            blocks.append(layer.cost.use)
    blocks += [ends.head] if ends.head else []
    peak = kept = ends.kept
    for index, block in enumerate(blocks):
        is_top = index == len(blocks) - 1  # its backward pass makes the bytes of `under_top`
        peak = max(peak, kept + block.backward + (0 if is_top else ends.under_top))
        kept += block.kept
    return Use(kept, max(peak, ends.embedding_backward))
