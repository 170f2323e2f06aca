"""Costs of a layer's MLP and the norm before it: down(silu(gate x) * up x), or without a gate, down(gelu(up x))."""

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
    """The sizes of an MLP."""

    hidden: int
    """Width of the residual stream."""
    ffn: int
    """Width of the up projection, and of the gate."""
    gated: bool
    """Whether the MLP has a gate, whose rows stand above those of the up projection in one matrix."""

    @cached_property
    def norm(self) -> Norm:
        """The norm before the MLP."""
        return Norm(MLP_NORM, self.hidden)

    @cached_property
    def fc1(self) -> Linear:
        """The gate and the up projection; without a gate, the up projection."""
        return Linear(FC1, self.ffn * (2 if self.gated else 1), self.hidden, True)

    @cached_property
    def fc2(self) -> Linear:
        """The down projection."""
        return Linear(FC2, self.hidden, self.ffn, False)

    def linears(self) -> dict[Target, Linear]:
        """Return the MLP's linears by target."""
        return {"fc1": self.fc1, "fc2": self.fc2}

    def costs(self, batch: Microbatch, linears: Mapping[Target, LinearCosts]) -> BlockCosts:
        """Return the costs of the MLP and its norm; `linears` are the costs of the MLP's linears.

        The MLP keeps what its norm and linears keep, and the outputs of gate and up. The backward pass runs from the
        gradient of the output in the residual stream to the gradient of the input.
        """
        norm, fc1, fc2 = self.norm.costs(batch), linears["fc1"], linears["fc2"]
        gate_up = batch.split(self.ffn) * (2 if self.gated else 1)
        tape = Tape()
        tape.follow(fc2.backward)
        tape.free(fc2.kept)
        tape.take(gate_up)  # the gradient of the activation's input
        tape.free(gate_up, batch.split(self.ffn))
        tape.follow(fc1.backward)
        tape.free(fc1.kept, gate_up)
        tape.follow(norm.backward)
        weights = (*norm.weights, *fc1.weights, *fc2.weights)
        return BlockCosts(weights, norm.kept + fc1.kept + gate_up + fc2.kept, tape)
