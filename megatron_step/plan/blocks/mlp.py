"""The MLP of a layer with its norm: down(silu(gate x) * up x), or plain, down(gelu(up x))."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from megatron_step.config.stages import Target
from megatron_step.plan.blocks.linear import Linear, LinearCosts
from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.norm import Norm
from megatron_step.plan.blocks.tape import BlockCosts, Tape
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

    def costs(self, batch: Microbatch, linears: Mapping[Target, LinearCosts]) -> BlockCosts:
        """Return what it takes with its `linears`. It keeps what norm and linears keep, and gate and up.

        Its backward pass is from its output's gradient in the residual stream to its input's.
        """
        norm, fc1, fc2 = self.norm.costs(batch), linears["fc1"], linears["fc2"]
        gate_up = batch.split(self.ffn) * (2 if self.gated else 1)
        tape = Tape()
        tape.follow(fc2.backward)
        tape.free(fc2.kept)
        tape.take(gate_up)  # the activation's
        tape.free(gate_up, batch.split(self.ffn))
        tape.follow(fc1.backward)
        tape.free(fc1.kept, gate_up)
        tape.follow(norm.backward)
        weights = (*norm.weights, *fc1.weights, *fc2.weights)
        return BlockCosts(weights, norm.kept + fc1.kept + gate_up + fc2.kept, tape)
