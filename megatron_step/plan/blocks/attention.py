"""The self-attention of a layer with its norm: qkv, rotation, softmax(q k^T) v, projection."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from megatron_step.config.stages import Target
from megatron_step.plan.blocks.core_attention import Core, CoreAttention
from megatron_step.plan.blocks.linear import Handling, Linear
from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.norm import Norm
from megatron_step.plan.blocks.tape import Tape
from megatron_step.plan.names import ATTENTION_NORM, KEY_NORM, PROJ, QKV, QUERY_NORM


@dataclass(frozen=True)
class Attention:
    """A self-attention of plain numbers: n heads over g groups, each of width d."""

    hidden: int
    """Width of the residual stream."""
    heads: int
    """n."""
    groups: int
    """g."""
    head_size: int
    """d."""
    seq_length: int
    """Tokens of a sequence."""
    qkv_bias: bool
    """Whether query, key and value projections have a bias."""
    qk_norm: bool
    """Whether queries and keys are normalised per head."""

    @cached_property
    def norm(self) -> Norm:
        """The norm before it."""
        return Norm(ATTENTION_NORM, self.hidden)

    @cached_property
    def qkv(self) -> Linear:
        """Queries, keys and values."""
        return Linear(QKV, (self.heads + 2 * self.groups) * self.head_size, self.hidden, True, self.qkv_bias)

    @cached_property
    def proj(self) -> Linear:
        """The output projection."""
        return Linear(PROJ, self.hidden, self.heads * self.head_size, False)

    @cached_property
    def core(self) -> Core:
        """softmax(q k^T) v."""
        return Core(self.heads, self.groups, self.head_size, self.seq_length, self.qk_norm)

    def linears(self) -> dict[Target, Linear]:
        """Its linears."""
        return {"qkv": self.qkv, "proj": self.proj}

    def weights(self, tensor: int, ranks: Mapping[Target, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of the modules; `ranks` are those of the linears' adapters."""
        yield from self.norm.weights()
        yield from self.proj.weights(tensor, ranks["proj"])
        yield from self.qkv.weights(tensor, ranks["qkv"])
        if self.qk_norm:
            yield from Norm(QUERY_NORM, self.head_size).weights()
            yield from Norm(KEY_NORM, self.head_size).weights()

    def kept(
        self, batch: Microbatch, handling: Mapping[Target, Handling], core: CoreAttention, recomputes_core: bool
    ) -> int:
        """Bytes from its forward to its backward pass."""
        held = self._held(batch, handling, core, recomputes_core)
        core_kept = 0 if recomputes_core else core.kept
        return self.norm.kept(batch) + held.qkv + held.inputs + held.context + core_kept + held.proj

    def backward(
        self,
        tape: Tape,
        batch: Microbatch,
        handling: Mapping[Target, Handling],
        core: CoreAttention,
        recomputes_core: bool,
    ) -> None:
        """From its output's gradient in the residual stream to the gradient of its normalised input."""
        held, queries = self._held(batch, handling, core, recomputes_core), self.core.queries(batch)
        qkv = queries + 2 * self.core.keys(batch)
        core_kept = 0 if recomputes_core else core.kept
        self.proj.backward(tape, batch, handling["proj"])
        tape.free(held.proj)
        if recomputes_core:
            tape.take(core.forward)
            tape.free(core.forward)
            core_kept = core.kept + queries  # with its output
            tape.take(core_kept)
        tape.take(core.backward)
        tape.free(core.backward)
        tape.take(qkv)
        tape.free(core_kept, held.inputs, held.context, queries)
        tape.take(held.inputs)  # back through rotation, and norms of queries and keys
        tape.free(qkv)
        self.qkv.backward(tape, batch, handling["qkv"])

    def _held(
        self, batch: Microbatch, handling: Mapping[Target, Handling], core: CoreAttention, recomputes_core: bool
    ) -> "_Held":
        keeps_context = handling["proj"].keeps_input or (core.keeps_output and not recomputes_core)
        return _Held(
            qkv=self.qkv.input_bytes(batch, handling["qkv"]) + self.qkv.adapter_kept(batch, handling["qkv"]),
            inputs=self._core_inputs(batch),
            context=self.core.queries(batch) if keeps_context else 0,
            proj=self.proj.adapter_kept(batch, handling["proj"]),
        )

    def _core_inputs(self, batch: Microbatch) -> int:
        """Queries, keys and values that are kept; with norms of queries and keys those before them, too."""
        queries, keys = self.core.queries(batch), self.core.keys(batch)
        if not self.qk_norm:
            return queries + 2 * keys
        is_grouped = self.groups // batch.tensor > 1 and self.groups < self.heads
        copied = queries if is_grouped else 0  # the groups' queries are not in one piece
        scales = 4 * batch.tokens * (self.heads + self.groups) // batch.tensor
        return queries + 2 * keys + copied + scales + queries + keys


@dataclass(frozen=True)
class _Held:
    """Bytes kept, beside the norm's and the core's."""

    qkv: int
    """Input and adapter of qkv."""
    inputs: int
    """Inputs of the core."""
    context: int
    """Output of the core, the input of the projection."""
    proj: int
    """Adapter of the projection."""
