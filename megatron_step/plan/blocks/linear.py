"""Costs of a layer's linear, y = x W^T (+ bias), and its adapter: weights, operations, and bytes of a micro-batch.

Shapes on each of t tensor-parallel ranks (Megatron-LM, Shoeybi et al., 2019), with r the rank of the adapter:

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
    """Whether the matrix has a gradient."""
    adapter_rank: int = 0
    """Rank of the adapter; 0 for no adapter."""
    drops: bool = False
    """Whether the adapter has dropout on its input."""
    dequantized: bool = False
    """Whether the frozen matrix is stored in 8 bits and dequantized for its product."""

    @property
    def keeps_input(self) -> bool:
        """Whether the backward pass needs the linear's input."""
        return self.trained or self.adapter_rank > 0


@dataclass(frozen=True)
class LinearCosts:
    """Costs of a linear on a rank, with one micro-batch."""

    weights: Weights
    """The weights of the linear and its adapter."""
    input_bytes: int
    """Bytes of the kept input (the rank's columns if the matrix's columns are split); 0 if the input is not kept."""
    adapter_bytes: int
    """Bytes of u = x A^T, which the adapter keeps in fp32; a share of 1 / t if the matrix's columns are split."""
    backward: Tape
    """Bytes in use from the output's gradient, which the caller frees, to the input's gradient."""
    flops: int
    """Operations of a training step per token, on all tensor-parallel ranks."""
    forward_flops: int
    """Operations of the forward pass per token without the adapter, on all tensor-parallel ranks."""

    @property
    def kept(self) -> int:
        """Bytes kept from the forward to the backward pass."""
        return self.input_bytes + self.adapter_bytes


@dataclass(frozen=True)
class Linear:
    """A linear, with the sizes of its whole matrix."""

    key: str
    """Name of the linear within its layer, in checkpoints."""
    outputs: int
    """Rows of the matrix, n."""
    inputs: int
    """Columns of the matrix, k."""
    column_parallel: bool
    """Whether the rows are split over tensor-parallel ranks (Megatron's column parallelism); else the columns are."""
    has_bias: bool = False
    """Whether the linear has a bias, which is split as the rows are."""

    def costs(self, batch: Microbatch, handling: Handling) -> LinearCosts:
        """Return the costs of the linear and its adapter.

        Each element of the matrix takes 2 operations per token in the forward pass, 2 for the input's gradient and, if
        the matrix is trained, 2 for the weight's gradient.
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
        """Return the bytes that the backward pass needs beside the gradients of the input and the output."""
        (rows, columns), rank, element = self._part(batch.tensor), handling.adapter_rank, batch.element_bytes
        # The adapter's gradients: of u in fp32, in the products' type and transposed; of A in fp32 and in its own type;
        # of B.
        needed = batch.tokens * rank * (4 + 2 * element) + rank * ((4 + element) * columns + element * rows)
        if handling.trained:
            # The widened block of the matrix is freed before this gradient is computed, and takes less.
            needed += batch.weight_gradient(rows, columns)
        elif handling.dequantized:
            needed += batch.matrix(rows, columns)  # the dequantized matrix
        else:
            needed += batch.widened(rows, columns)
        if rank and handling.drops:
            needed += 2 * batch.whole(columns)  # the masked input, and the adapter's term of the input's gradient
        return needed

    def _part(self, tensor: int) -> tuple[int, int]:
        """Return the rows and columns of the matrix on a rank."""
        if self.column_parallel:
            return self.outputs // tensor, self.inputs
        return self.outputs, self.inputs // tensor
