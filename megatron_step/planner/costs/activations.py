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

The blocks (plan/blocks) count each part of a model; this file puts them together for a rank. Counted are the operations
of layers/ and ops/ on the kernels of csrc/; the plain-torch fallbacks keep more.
"""

from dataclasses import dataclass, replace

from megatron_step.config.run import RunConfig
from megatron_step.plan.blocks.attention import attention_of
from megatron_step.plan.blocks.embedding import embedding_of
from megatron_step.plan.blocks.head import head_of
from megatron_step.plan.blocks.layer import layer_blocks
from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.tape import Use
from megatron_step.plan.layout import Chunk, num_microbatches, rank_chunks
from megatron_step.plan.names import EMBEDDING
from megatron_step.plan.parameters import layer_handling, layer_parameters
from megatron_step.plan.stages import Stage
from megatron_step.plan.states import RECIPES, recipe_of
from megatron_step.plan.trainable import treatment
from megatron_step.planner.costs.pipeline_schedule import held_messages, passes


def activation_bytes(config: RunConfig, stage: Stage, vocab_size: int, dp_size: int, pp_rank: int) -> int:
    """The most that a step of full global batches needs at once on a pipeline rank, beside the model states."""
    microbatches = num_microbatches(config.training, dp_size)
    chunks = [_chunk_use(config, stage, vocab_size, chunk) for chunk in rank_chunks(config.parallel, pp_rank)]
    peak = live = between_passes(config, microbatches, pp_rank)
    for vp_stage, is_forward in passes(config.parallel, microbatches, pp_rank):
        if is_forward:
            live += chunks[vp_stage].kept
        else:
            live -= chunks[vp_stage].kept
            peak = max(peak, live + chunks[vp_stage].backward)
    return peak


def between_passes(config: RunConfig, microbatches: int, pp_rank: int) -> int:
    """Bytes in use on a pipeline rank beside what passes keep: messages, buffers, single numbers such as losses."""
    batch, hidden = microbatch_of(config), config.model.hidden_size
    # What tensor-parallel ranks exchange is let go of a little late: by the backend, once it has noticed the end.
    exchanged = batch.whole(hidden) if batch.tensor > 1 else 0
    held = held_messages(config.parallel, microbatches, pp_rank) * batch.stream(hidden)
    scores = attention_of(config.model).core.shared_buffer(batch) if config.planner.attention == "unfused" else 0
    return held + exchanged + scores + _SCALARS_BYTES


_SCALARS_BYTES = 4096


def microbatch_of(config: RunConfig) -> Microbatch:
    """The micro-batch of a run, on a tensor-parallel rank."""
    return Microbatch(
        tokens=config.training.micro_batch_size * config.model.seq_length,
        element_bytes=RECIPES[config.training.precision].weight.element_bytes,
        tensor=config.parallel.tensor_parallel_size,
        sequence_parallel=config.parallel.sequence_parallel,
    )


def layer_use(config: RunConfig, stage: Stage, layer: int) -> Use:
    """Bytes of a micro-batch in a layer, by whether its matrices are trained and whether they have adapters."""
    batch, blocks = microbatch_of(config), layer_blocks(config.model)
    dequantized = recipe_of(config).frozen_matrix is not None
    handling = {
        target: replace(how, dequantized=dequantized) for target, how in layer_handling(config, stage, layer).items()
    }
    recomputes_core, core = config.parallel.recompute == "selective", blocks.attention.core
    keeps_scores = config.planner.attention == "unfused"
    attention = core.unfused(batch, recomputes_core) if keeps_scores else core.linear(batch)
    whole = blocks.use(batch, handling, attention, recomputes_core)
    if config.parallel.recompute == "full":
        stream = batch.stream(config.model.hidden_size)
        return Use(stream, whole.backward + stream)  # computed again, its output too
    return whole


@dataclass(frozen=True)
class ChunkEnds:
    """Bytes of one micro-batch in what a model chunk has beside its layers."""

    below: int
    """From its forward to its backward pass: the output sent on, what the embedding keeps."""
    under_top: int
    """More of them once the topmost part's backward pass is over."""
    embedding_backward: int
    """The most in the embedding's backward pass, with all that is then kept."""
    head: Use | None
    """The final norm, the output layer and the loss, where they are here."""


def chunk_ends(config: RunConfig, stage: Stage, vocab_size: int, *, first: bool, last: bool) -> ChunkEnds:
    """The ends of a chunk that is or is not the `first` of the model, and the `last`."""
    batch, model = microbatch_of(config), config.model
    embedding, head = embedding_of(model, vocab_size), head_of(model, vocab_size)
    embedding_trained = treatment(EMBEDDING, stage, config).trained
    # Another rank's chunk has this one's output until its gradient comes back, which stays to the end as well.
    sent = 0 if last else batch.stream(head.hidden)
    # The output layer's gradient of a tied weight waits for the embedding's; then there is their sum, too.
    waits = first and last and head.tied and embedding_trained
    waiting = embedding.gradient(batch) if waits else 0
    return ChunkEnds(
        below=sent + (embedding.kept(batch) if first else 0),
        under_top=waiting + sent,
        embedding_backward=2 * sent + 2 * waiting + embedding.backward(batch) if first and embedding_trained else 0,
        head=head.use(batch, treatment(head.output_key, stage, config).trained) if last else None,
    )


def _chunk_use(config: RunConfig, stage: Stage, vocab_size: int, chunk: Chunk) -> Use:
    ends = chunk_ends(config, stage, vocab_size, first=chunk.is_first, last=chunk.is_last)
    parts: list[Use] = []
    flows = not chunk.is_first or treatment(EMBEDDING, stage, config).trained
    flows = flows or config.parallel.recompute == "full"
    for layer in stage.layers_of(chunk):
        # Below the first trained weight nothing has a gradient, and nothing is kept.
        flows = flows or any(parameter.treatment.trained for parameter in layer_parameters(config, stage, layer))
        if flows:
            parts.append(layer_use(config, stage, layer))
    parts += [ends.head] if ends.head else []
    peak = below = ends.below
    for index, part in enumerate(parts):
        is_top = index == len(parts) - 1  # which makes the first, and begins with the second
        peak = max(peak, below + part.backward + (0 if is_top else ends.under_top))
        below += part.kept
    return Use(below, max(peak, ends.embedding_backward))
