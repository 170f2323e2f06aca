"""Bytes that a training step needs beside the model states, by what the layers keep for their backward pass.

With T tokens of a micro-batch on t tensor-parallel ranks, e bytes an element, R = e T h of the residual stream (over t
with sequence parallelism), Q = e T n d / t of the queries, K = e T g d / t of the keys, U = e T f / t of an ffn vector
and G = 2 U of gate and up (GELU: U), a layer keeps

    two norms    R + 4 T each (over t)          attention    2 Q + 2 K + A              activation   G
    qkv, fc1     R if trained or adapted        fc2          U if trained or adapted
    an adapter's u    4 T r, over t where the linear is split by columns

and proj the attention's output, which is counted there; A is the core attention's (planner/core_attention.py). The
last pipeline rank keeps its logits once, e T v / t. The backward pass is followed event by event: each gradient is
taken when an operation makes it and freed with what the operation had kept after its last use; the peak is the most
that is in use at once. A layer that is recomputed keeps its input, and all else only in its own backward pass.

Counted are the operations of layers/ and ops/ on the kernels of csrc/; the plain-torch fallbacks keep more.
"""

from dataclasses import dataclass

from megatron_step.config.run import RunConfig
from megatron_step.config.stages import Target
from megatron_step.plan.names import layer_key
from megatron_step.plan.parameters import layer_linears, layer_parameters
from megatron_step.plan.stages import Stage
from megatron_step.plan.states import RECIPES, recipe_of
from megatron_step.plan.trainable import has_adapters, treatment
from megatron_step.planner.core_attention import attention_buffer, core_attention
from megatron_step.planner.pipeline_schedule import held_messages, passes


def activation_bytes(config: RunConfig, stage: Stage, vocab_size: int, dp_size: int, pp_rank: int) -> int:
    """The most that a step of full global batches needs at once on a pipeline rank, beside the model states."""
    parallel, training = config.parallel, config.training
    num_microbatches = training.global_batch_size // (training.micro_batch_size * dp_size)
    chunks = [_chunk(config, stage, vocab_size, pp_rank, at) for at in range(parallel.virtual_pipeline_size)]
    peak = live = between_passes(config, num_microbatches, pp_rank)
    for vp_stage, is_forward in passes(parallel, num_microbatches, pp_rank):
        if is_forward:
            live += chunks[vp_stage].kept
        else:
            live -= chunks[vp_stage].kept
            peak = max(peak, live + chunks[vp_stage].backward)
    return peak


def between_passes(config: RunConfig, num_microbatches: int, pp_rank: int) -> int:
    """Bytes in use on a pipeline rank beside what passes keep: messages, buffers, single numbers such as losses."""
    sizes = _sizes(config)
    # What tensor-parallel ranks exchange is let go of a little late: by the backend, once it has noticed the end.
    exchanged = sizes.hidden if config.parallel.tensor_parallel_size > 1 else 0
    held = held_messages(config.parallel, num_microbatches, pp_rank) * sizes.residual
    return held + exchanged + attention_buffer(config) + _SCALARS_BYTES


_SCALARS_BYTES = 4096


@dataclass(frozen=True)
class Use:
    """Bytes of one micro-batch in a part of the model."""

    kept: int
    """From its forward to its backward pass."""
    backward: int
    """The most in its backward pass, with what it kept."""


class _Tape:
    """Follows what is in use."""

    def __init__(self, live: int) -> None:
        self.live = self.peak = live

    def take(self, *sizes: int) -> None:
        self.live += sum(sizes)
        self.peak = max(self.peak, self.live)

    def free(self, *sizes: int) -> None:
        self.live -= sum(sizes)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of a micro-batch's tensors on a rank."""

    tokens: int
    """T; a count."""
    element: int
    """e."""
    hidden: int
    """e T h: what a linear sees."""
    residual: int
    """R."""
    scale: int
    """A norm's scale, fp32."""
    queries: int
    """Q."""
    keys: int
    """K."""
    ffn: int
    """U."""
    gate_up: int
    """G."""

    @property
    def qkv(self) -> int:
        """Queries, keys and values."""
        return self.queries + 2 * self.keys


def _sizes(config: RunConfig) -> _Sizes:
    model, parallel = config.model, config.parallel
    tensor = parallel.tensor_parallel_size
    tokens, element = config.training.micro_batch_size * model.seq_length, element_bytes(config)
    parts = tensor if parallel.sequence_parallel else 1
    head, ffn = model.attention_head_size, element * tokens * model.ffn_hidden_size // tensor
    return _Sizes(
        tokens=tokens,
        element=element,
        hidden=element * tokens * model.hidden_size,
        residual=element * tokens * model.hidden_size // parts,
        scale=4 * tokens // parts,
        queries=element * tokens * model.num_attention_heads * head // tensor,
        keys=element * tokens * model.query_groups * head // tensor,
        ffn=ffn,
        gate_up=2 * ffn if model.mlp == "swiglu" else ffn,
    )


def element_bytes(config: RunConfig) -> int:
    """Bytes of an element of what flows through the layers."""
    return RECIPES[config.training.precision].weight.element_bytes


@dataclass(frozen=True)
class _Linear:
    """A linear of a layer."""

    column_parallel: bool
    keeps_input: bool
    kept: int
    """Bytes that its adapter keeps beside the input."""
    temporary: int
    """Bytes that its backward pass needs beside the gradients of its input and output."""


def _linear(config: RunConfig, sizes: _Sizes, target: Target, trained: bool, adapted: bool) -> _Linear:
    linear, tensor, rank = (
        layer_linears(config.model)[target],
        config.parallel.tensor_parallel_size,
        config.adapter.rank,
    )
    rows = linear.outputs // tensor if linear.column_parallel else linear.outputs
    columns = linear.inputs if linear.column_parallel else linear.inputs // tensor
    adapted = adapted and target in config.adapter.targets
    kept = temporary = 0
    if trained:
        temporary = _weight_gradient(rows, columns, sizes.element)
    elif recipe_of(config).frozen_matrix:
        temporary = rows * columns * sizes.element  # the matrix, for the product
    if adapted:
        kept = 4 * sizes.tokens * rank // (1 if linear.column_parallel else tensor)
        # The gradients of u in fp32, as its products want it and transposed; of A in fp32 and as it is, and of B.
        temporary += sizes.tokens * rank * (4 + 2 * sizes.element)
        temporary += rank * ((4 + sizes.element) * columns + sizes.element * rows)
        if config.adapter.dropout > 0:
            temporary += 2 * sizes.element * sizes.tokens * columns  # the input with zeros, the adapter's part of dx
    return _Linear(linear.column_parallel, trained or adapted, kept, temporary)


def _weight_gradient(rows: int, columns: int, element: int) -> int:
    """Bytes of a weight's gradient as it is made: oneDNN's fp32 product is turned round (ops/linear.py)."""
    return rows * columns * element * (2 if element == 4 and rows > columns else 1)


def _linear_backward(tape: _Tape, linear: _Linear, sizes: _Sizes, sequence_parallel: bool, dx: int) -> None:
    """From its output's gradient, which the caller frees, to its input's, `dx` bytes."""
    if linear.column_parallel and sequence_parallel:  # x is gathered again, dx scattered
        gathered = sizes.hidden if linear.keeps_input else 0
        tape.take(gathered, dx, sizes.residual)
        tape.free(dx)
        tape.take(linear.temporary)
        tape.free(gathered, linear.temporary)
    else:
        gathered = sizes.hidden if sequence_parallel else 0  # the output's gradient
        tape.take(gathered, dx, linear.temporary)
        tape.free(gathered, linear.temporary)


def layer_use(config: RunConfig, stage: Stage, layer: int) -> Use:
    """A layer, by whether its matrices are trained and whether they have adapters."""
    sizes = _sizes(config)
    trained = treatment(layer_key(layer, "mlp.linear_fc1.weight"), stage, config).trained
    adapted = has_adapters(layer, stage, config)
    if config.parallel.recompute == "full":
        whole = _kept_layer(config, sizes, trained, adapted)
        return Use(sizes.residual, whole.backward + sizes.residual)  # computed again, its output too
    return _kept_layer(config, sizes, trained, adapted)


def _kept_layer(config: RunConfig, sizes: _Sizes, trained: bool, adapted: bool) -> Use:
    qkv = _linear(config, sizes, "qkv", trained, adapted)
    proj = _linear(config, sizes, "proj", trained, adapted)
    fc1 = _linear(config, sizes, "fc1", trained, adapted)
    fc2 = _linear(config, sizes, "fc2", trained, adapted)
    selective = config.parallel.recompute == "selective"
    norm = sizes.residual + sizes.scale
    qkv_input = sizes.residual if qkv.keeps_input else 0
    fc1_input = sizes.residual if fc1.keeps_input else 0
    fc2_input = sizes.ffn if fc2.keeps_input else 0
    attention = _attention_inputs(config, sizes)
    core = core_attention(config, sizes.queries, sizes.keys)
    core_kept = 0 if selective else core.kept
    context = sizes.queries if proj.keeps_input or (core.keeps_output and not selective) else 0
    kept_attention = norm + qkv_input + qkv.kept + attention + context + core_kept + proj.kept
    kept_mlp = norm + fc1_input + fc1.kept + sizes.gate_up + fc2_input + fc2.kept

    sequence_parallel = config.parallel.sequence_parallel
    tape = _Tape(kept_attention + kept_mlp + sizes.residual)  # the gradient of the output comes in
    _linear_backward(tape, fc2, sizes, sequence_parallel, dx=sizes.ffn)
    tape.free(fc2_input, fc2.kept)
    tape.take(sizes.gate_up)  # the activation's
    tape.free(sizes.gate_up, sizes.ffn)
    _linear_backward(tape, fc1, sizes, sequence_parallel, dx=sizes.hidden)
    tape.free(fc1_input, fc1.kept, sizes.gate_up)
    tape.take(sizes.residual)  # the norm's
    tape.free(norm, sizes.residual)
    tape.take(sizes.residual)  # the sum with that of the residual stream
    tape.free(2 * sizes.residual)
    _linear_backward(tape, proj, sizes, sequence_parallel, dx=sizes.queries)
    tape.free(proj.kept)
    if selective:
        tape.take(core.forward)
        tape.free(core.forward)
        core_kept = core.kept + sizes.queries  # with its output
        tape.take(core_kept)
    tape.take(core.backward)
    tape.free(core.backward)
    tape.take(sizes.qkv)
    tape.free(core_kept, attention, context, sizes.queries)
    tape.take(attention)  # back through rotation, and norms of queries and keys
    tape.free(sizes.qkv)
    _linear_backward(tape, qkv, sizes, sequence_parallel, dx=sizes.hidden)
    return Use(kept_attention + kept_mlp, tape.peak)


def _attention_inputs(config: RunConfig, sizes: _Sizes) -> int:
    """Queries, keys and values that are kept; with norms of queries and keys those before them, too."""
    if not config.model.qk_norm:
        return sizes.qkv
    groups = config.model.query_groups // config.parallel.tensor_parallel_size
    grouped = groups > 1 and config.model.query_groups < config.model.num_attention_heads
    copied = sizes.queries if grouped else 0  # the groups' queries are not in one piece
    heads = config.model.num_attention_heads + config.model.query_groups
    scales = 4 * sizes.tokens * heads // config.parallel.tensor_parallel_size
    return sizes.qkv + copied + scales + sizes.queries + sizes.keys


def _head(config: RunConfig, sizes: _Sizes, vocab_size: int, trained: bool) -> Use:
    """The final norm, the output layer and the loss (ops/linear_cross_entropy.py)."""
    rows = config.model.padded_vocab_size(vocab_size) // config.parallel.tensor_parallel_size
    logits = sizes.element * sizes.tokens * rows
    # For a token: its largest logit, its total and its label's logit in fp64, its label, whether it counts.
    kept = sizes.residual + sizes.scale + sizes.hidden + logits + sizes.tokens * (3 * 8 + 8 + 1)
    weight = _weight_gradient(rows, config.model.hidden_size, sizes.element) if trained else 0
    losses = 3 * 4 * sizes.tokens  # losses, their gradients, these times counted
    return Use(kept, kept + losses + sizes.hidden + weight)


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
    sizes, parallel, tied = _sizes(config), config.parallel, config.model.tie_embeddings
    embedding_trained = treatment("embedding.word_embeddings.weight", stage, config).trained
    output = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
    rows = config.model.padded_vocab_size(vocab_size) // parallel.tensor_parallel_size
    table = rows * config.model.hidden_size * sizes.element if embedding_trained else 0
    # Another rank's chunk has this one's output until its gradient comes back, which stays to the end as well.
    sent = 0 if last else sizes.residual
    # The output layer's gradient of a tied weight waits for the embedding's; then there is their sum, too.
    waiting = table if first and last and tied else 0
    # Of tokens whose rows are elsewhere, where they are, and the number of each one's row here.
    lookup = (1 + 8) * sizes.tokens if first and parallel.tensor_parallel_size > 1 else 0
    embedding = 2 * sent + 2 * waiting + 2 * sizes.hidden + sizes.residual + table
    return ChunkEnds(
        below=sent + lookup,
        under_top=waiting + sent,
        embedding_backward=embedding if first and embedding_trained else 0,
        head=_head(config, sizes, vocab_size, treatment(output, stage, config).trained) if last else None,
    )


def _chunk(config: RunConfig, stage: Stage, vocab_size: int, pp_rank: int, vp_stage: int) -> Use:
    parallel = config.parallel
    first = pp_rank == 0 and vp_stage == 0
    last = pp_rank == parallel.pipeline_parallel_size - 1 and vp_stage == parallel.virtual_pipeline_size - 1
    ends = chunk_ends(config, stage, vocab_size, first=first, last=last)
    parts: list[Use] = []
    flows = not first or treatment("embedding.word_embeddings.weight", stage, config).trained
    flows = flows or parallel.recompute == "full"
    for layer in stage.layers_of_chunk(pp_rank, vp_stage, parallel):
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
