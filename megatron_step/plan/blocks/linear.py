"""A linear of a layer, y = x W^T (+ bias) with its adapter: weights, products, and bytes of a micro-batch.

Over t tensor-parallel ranks (Megatron-LM, Shoeybi et al., 2019), with r the rank of the adapter:

    split over      matrix [n, k]           adapter A [r, k]    adapter B [n, r]
    rows            [n / t, k]              [r / t, k]          [n / t, r]          qkv, fc1
    columns         [n, k / t]              [r, k / t]          [n, r / t]          proj, fc2
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.tape import Tape
from megatron_step.plan.names import ADAPTER_A, ADAPTER_B


@dataclass(frozen=True)
class Handling:
    """What a stage does with a linear."""

    trained: bool
    """Whether its matrix has a gradient."""
    adapter_rank: int = 0
    """Rank of its adapter; 0 for none."""
    drops: bool = False
    """Whether the adapter's input is dropped out."""
    dequantized: bool = False
    """Whether a frozen matrix is kept in 8 bits, and put together for its product."""

    @property
    def keeps_input(self) -> bool:
        """Whether its backward pass needs the input."""
        return self.trained or self.adapter_rank > 0


@dataclass(frozen=True)
class Linear:
    """A linear, whole."""

    key: str
    """Its name below the layer's, in checkpoints."""
    outputs: int
    """Rows of its matrix."""
    inputs: int
    """Columns of its matrix."""
    column_parallel: bool
    """Whether its rows are split over tensor-parallel ranks; otherwise its columns are."""
    has_bias: bool = False
    """Whether it has a bias, split as the rows are."""

    def weights(self, tensor: int, adapter_rank: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes on one of `tensor` ranks."""
        rows, columns = self._part(tensor)
        yield f"{self.key}.weight", (rows, columns)
        if self.has_bias:
            yield f"{self.key}.bias", (rows,)
        if adapter_rank:
            split = adapter_rank // tensor
            a_rank, b_rank = (split, adapter_rank) if self.column_parallel else (adapter_rank, split)
            yield f"{self.key}.{ADAPTER_A}", (a_rank, columns)
            yield f"{self.key}.{ADAPTER_B}", (rows, b_rank)

    def flops(self, handling: Handling) -> int:
        """Operations of a training step for a token: 2 of an element forward, 2 for the input's gradient, 2 for the
        weight's, which a frozen one does not have."""
        per_weight = 6 if handling.trained else 4
        return per_weight * self.inputs * self.outputs + 6 * handling.adapter_rank * (self.inputs + self.outputs)

    def forward_flops(self) -> int:
        """Operations of its forward pass for a token, without an adapter."""
        return 2 * self.inputs * self.outputs

    def input_bytes(self, batch: Microbatch, handling: Handling) -> int:
        """Bytes of the input that is kept, where it is: of the residual stream, or of the rank's columns."""
        if not handling.keeps_input:
            return 0
        return batch.stream(self.inputs) if self.column_parallel else batch.split(self.inputs)

    def adapter_kept(self, batch: Microbatch, handling: Handling) -> int:
        """Bytes that its adapter keeps beside the input: u in fp32, over t where the rows are split."""
        return 4 * batch.tokens * handling.adapter_rank // (1 if self.column_parallel else batch.tensor)

    def backward(self, tape: Tape, batch: Microbatch, handling: Handling) -> None:
        """From its output's gradient, which the caller frees, to its input's."""
        temporary = self._temporary(batch, handling)
        if self.column_parallel and batch.sequence_parallel:  # x is gathered again, dx scattered
            gathered = batch.whole(self.inputs) if handling.keeps_input else 0
            dx = batch.whole(self.inputs)
            tape.take(gathered, dx, batch.stream(self.inputs))
            tape.free(dx)
            tape.take(temporary)
        else:
            gathered = batch.whole(self.outputs) if batch.sequence_parallel else 0  # the output's gradient
            dx = batch.whole(self.inputs) if self.column_parallel else batch.split(self.inputs)
            tape.take(gathered, dx, temporary)
        tape.free(gathered, temporary)

    def _temporary(self, batch: Microbatch, handling: Handling) -> int:
        """Bytes that its backward pass needs beside the gradients of its input and output."""
        (rows, columns), rank, element = self._part(batch.tensor), handling.adapter_rank, batch.element_bytes
        needed = 0
        if handling.trained:
            needed = weight_gradient(rows, columns, element)
        elif handling.dequantized:
            needed = rows * columns * element  # the matrix, for the product
        if rank:
            # The gradients of u in fp32, as its products want it and transposed; of A in fp32 and as it is, and of B.
            needed += batch.tokens * rank * (4 + 2 * element)
            needed += rank * ((4 + element) * columns + element * rows)
            if handling.drops:
                needed += 2 * batch.whole(columns)  # the input with zeros, the adapter's part of dx
        return needed

    def _part(self, tensor: int) -> tuple[int, int]:
        """Rows and columns of its matrix on a rank."""
        if self.column_parallel:
            return self.outputs // tensor, self.inputs
        return self.outputs, self.inputs // tensor


def weight_gradient(rows: int, columns: int, element: int) -> int:
    """Bytes of a weight's gradient as it is made: oneDNN's fp32 product is turned round (ops/linear.py).

    The BLAS, which takes the product on CPUs without AVX-512, needs no copy; a plan covers both kinds of CPU.
    """
    return rows * columns * element * (2 if element == 4 and rows > columns else 1)
