"""Bytes that Muon's update needs beside the model states, once the gradients are complete.

With M elements of the matrix [n, m] that a rank has whole, k = min(n, m), and S elements of its shards of the matrices
that R ranks orthogonalise at once, the largest of

    4 (2 M + 2 k^2 + 1)  Newton-Schulz: the matrix, the next one, its square, a polynomial of it, and its norm
    4 (S + M)            what is sent and what is received
    4 S + B C            momentum that is decoded, C elements at a time, B bytes each

in fp32, with 4 (S + M) more if R > 1: the backend frees an exchange a little after its end. With CUDA and bf16 weights
the matrices are bf16 and take half of that. Matrices are dealt to the ranks as optim/whole_matrices.py does.
"""

from collections.abc import Sequence

from megatron_step.plan.matrices import ELEMENTS_AT_ONCE, Matrix, logical_matrices, rule_of
from megatron_step.plan.names import in_layer, layer_key
from megatron_step.plan.resolved import ResolvedConfig
from megatron_step.plan.states import FP32
from megatron_step.planner.costs.held import HeldChunk

_ROUNDED_BYTES, _FP32_BYTES = 49, 16
"""B with a momentum in 8 or 16 bits, whose random bits are drawn in int64, and with one in fp32; measured."""


def update_bytes(resolved: ResolvedConfig, chunks: Sequence[HeldChunk]) -> int:
    """Return the most that the update needs at once on a pipeline rank that holds `chunks`; 0 for AdamW."""
    matrices = sorted(_matrices(resolved, chunks), key=lambda matrix: (-matrix.numel, matrix))
    parallel = resolved.config.parallel
    owners = resolved.dp_size if parallel.distributed_optimizer else 1
    ranks = owners * parallel.tensor_parallel_size
    trained = sum(one.numel for held in chunks for one in held.parameters if one.treatment.trained)
    rounds = (matrices[first : first + ranks] for first in range(0, len(matrices), ranks))
    return max((_round_bytes(resolved, dealt, ranks, -(-trained // owners)) for dealt in rounds), default=0)


def _round_bytes(resolved: ResolvedConfig, dealt: Sequence[Matrix], ranks: int, owned: int) -> int:
    """Return the most for the matrices that the ranks have at once, of which one owns at most `owned` elements."""
    largest, tensor = dealt[0], resolved.config.parallel.tensor_parallel_size
    sent = min(sum(matrix.numel for matrix in dealt) // tensor, owned)
    smaller = min(largest.rows, largest.columns)
    at_once = max(ELEMENTS_AT_ONCE // largest.columns, 1) * largest.columns
    rounds = (resolved.recipe.momentum or resolved.recipe.first_moment) != FP32
    exchange = FP32.bytes(sent + largest.numel) if ranks > 1 else 0
    return exchange + max(
        FP32.bytes(2 * largest.numel + 2 * smaller**2 + 1),
        exchange,
        FP32.bytes(sent) + (_ROUNDED_BYTES if rounds else _FP32_BYTES) * min(at_once, largest.numel // tensor),
    )


def _matrices(resolved: ResolvedConfig, chunks: Sequence[HeldChunk]) -> list[Matrix]:
    """Return the whole logical matrices that Muon trains in the chunks."""
    linears = {layer_key(0, f"{linear.key}.weight"): linear for linear in resolved.blocks.layer.linears().values()}
    matrices: list[Matrix] = []
    for parameter in (one for held in chunks for one in held.parameters if one.treatment.trained):
        if rule_of(parameter.key, parameter.shape, resolved.recipe.rule) == "muon":
            linear = linears[in_layer(parameter.key, 0)]
            matrices += logical_matrices(parameter.key, linear.outputs, linear.inputs, resolved.config.model)
    return matrices
