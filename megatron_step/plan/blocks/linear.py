"""A linear of a layer, y = x W^T (+ bias) with its adapter: weights, products, and bytes of a micro-batch.

Over t tensor-parallel ranks (Megatron-LM, Shoeybi et al., 2019), with r the rank of the adapter:

    split over      matrix [n, k]           adapter A [r, k]    adapter B [n, r]
    rows            [n / t, k]              [r / t, k]          [n / t, r]          qkv, fc1
    columns         [n, k / t]              [r, k / t]          [n, r / t]          proj, fc2
"""

from dataclasses import dataclass

from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.tape import Tape, Weights
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
class LinearCosts:
    """What a linear takes on a rank, with one micro-batch."""

    weights: Weights
    """Its weights."""
    input_bytes: int
    """Bytes of its input, where it is kept: of the residual stream, or of the rank's columns."""
    adapter_bytes: int
    """Bytes that its adapter keeps beside the input: u in fp32, over t where the columns are split."""
    backward: Tape
    """From its output's gradient, which the caller frees, to its input's."""
    flops: int
    """Operations of a training step for a token."""
    forward_flops: int
    """Operations of its forward pass for a token, without the adapter."""

    @property
    def kept(self) -> int:
        """Bytes from its forward to its backward pass."""
        return self.input_bytes + self.adapter_bytes


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

    def costs(self, batch: Microbatch, handling: Handling) -> LinearCosts:
        """Return what it takes.

        Operations: 2 of an element forward, 2 for the input's gradient, 2 for the weight's, which a frozen one lacks.
        """
        rank, elements = handling.adapter_rank, self.inputs * self.outputs
        input_bytes = batch.stream(self.inputs) if self.column_parallel else batch.split(self.inputs)
        return LinearCosts(
            weights=self._weights(batch.tensor, rank),
            input_bytes=input_bytes if handling.keeps_input else 0,
            adapter_bytes=4 * batch.tokens * rank // (1 if self.column_parallel else batch.tensor),
            backward=self._backward(batch, handling),
            flops=(6 if handling.trained else 4) * elements + 6 * rank * (self.inputs + self.outputs),
            forward_flops=2 * elements,
        )

    def _weights(self, tensor: int, adapter_rank: int) -> Weights:
        rows, columns = self._part(tensor)
        weights: list[tuple[str, tuple[int, ...]]] = [(f"{self.key}.weight", (rows, columns))]
        if self.has_bias:
            weights.append((f"{self.key}.bias", (rows,)))
        if adapter_rank:
            split = adapter_rank // tensor
            a_rank, b_rank = (split, adapter_rank) if self.column_parallel else (adapter_rank, split)
            weights += [(f"{self.key}.{ADAPTER_A}", (a_rank, columns)), (f"{self.key}.{ADAPTER_B}", (rows, b_rank))]
        return tuple(weights)

    def _backward(self, batch: Microbatch, handling: Handling) -> Tape:
        tape, temporary = Tape(), self._temporary(batch, handling)
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
        return tape

    def _temporary(self, batch: Microbatch, handling: Handling) -> int:
        """Bytes that its backward pass needs beside the gradients of its input and output."""
        (rows, columns), rank, element = self._part(batch.tensor), handling.adapter_rank, batch.element_bytes
        # The gradients of u in fp32, as its products want it and transposed; of A in fp32 and as it is, and of B.
        needed = batch.tokens * rank * (4 + 2 * element) + rank * ((4 + element) * columns + element * rows)
        if handling.trained:
            # The matrix is widened for the input's gradient before this gradient, which takes more, is made.
            needed += batch.weight_gradient(rows, columns)
        elif handling.dequantized:
            needed += batch.matrix(rows, columns)  # the matrix, for the product
        else:
            needed += batch.widened(rows, columns)
        if rank and handling.drops:
            needed += 2 * batch.whole(columns)  # the input with zeros, the adapter's part of dx
        return needed

    def _part(self, tensor: int) -> tuple[int, int]:
        """Rows and columns of its matrix on a rank."""
        if self.column_parallel:
            return self.outputs // tensor, self.inputs
        return self.outputs, self.inputs // tensor
