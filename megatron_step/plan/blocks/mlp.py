"""The MLP of a layer with its norm: down(silu(gate x) * up x), or plain, down(gelu(up x))."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from megatron_step.config.stages import Target
from megatron_step.plan.blocks.linear import Handling, Linear
from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.norm import Norm
from megatron_step.plan.blocks.tape import Tape
from megatron_step.plan.names import FC1, FC2, MLP_NORM


@dataclass(frozen=True)
class Mlp:
    """An MLP of plain numbers."""

    hidden: int
    """Width of the residual stream."""
    ffn: int
    """Width of the MLP; of a gated one, of gate and up each."""
    gated: bool
    """Whether it has the gate above the up projection, in one matrix."""

    @cached_property
    def norm(self) -> Norm:
        """The norm before it."""
        return Norm(MLP_NORM, self.hidden)

    @cached_property
    def fc1(self) -> Linear:
        """Gate and up, or up."""
        return Linear(FC1, self.ffn * (2 if self.gated else 1), self.hidden, True)

    @cached_property
    def fc2(self) -> Linear:
        """Down."""
        return Linear(FC2, self.hidden, self.ffn, False)

    def linears(self) -> dict[Target, Linear]:
        """Its linears."""
        return {"fc1": self.fc1, "fc2": self.fc2}

    def weights(self, tensor: int, ranks: Mapping[Target, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of the modules; `ranks` are those of the linears' adapters."""
        yield from self.norm.weights()
        yield from self.fc1.weights(tensor, ranks["fc1"])
        yield from self.fc2.weights(tensor, ranks["fc2"])

    def kept(self, batch: Microbatch, handling: Mapping[Target, Handling]) -> int:
        """Bytes from its forward to its backward pass: the norm's, gate and up, and what the linears keep."""
        fc1, fc2 = self._kept_of_linears(batch, handling)
        return self.norm.kept(batch) + fc1 + self._gate_up(batch) + fc2

    def backward(self, tape: Tape, batch: Microbatch, handling: Mapping[Target, Handling]) -> None:
        """From its output's gradient in the residual stream to its input's."""
        fc1, fc2 = self._kept_of_linears(batch, handling)
        gate_up = self._gate_up(batch)
        self.fc2.backward(tape, batch, handling["fc2"])
        tape.free(fc2)
        tape.take(gate_up)  # the activation's
        tape.free(gate_up, batch.split(self.ffn))
        self.fc1.backward(tape, batch, handling["fc1"])
        tape.free(fc1, gate_up)
        self.norm.backward(tape, batch)

    def _gate_up(self, batch: Microbatch) -> int:
        return batch.split(self.ffn) * (2 if self.gated else 1)

    def _kept_of_linears(self, batch: Microbatch, handling: Mapping[Target, Handling]) -> tuple[int, int]:
        return (
            self.fc1.input_bytes(batch, handling["fc1"]) + self.fc1.adapter_kept(batch, handling["fc1"]),
            self.fc2.input_bytes(batch, handling["fc2"]) + self.fc2.adapter_kept(batch, handling["fc2"]),
        )
