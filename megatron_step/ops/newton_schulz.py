"""The nearest orthogonal matrix, about, by the method of Newton and Schulz (Muon, Jordan et al., 2024)."""

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c of the step X <- a X + (b A + c A^2) X with A = X X^T (https://kellerjordan.github.io/posts/muon). Five
steps take singular values from 0.002 to 1 to values from 0.68 to 1.21."""
_STEPS = 5
_SMALLEST_NORM = 1e-30  # of a matrix that is not taken for zero


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return U V^T of a matrix U S V^T [n, m], with singular values near 1; a zero matrix stays zero.

    It is computed in the type of `matrix`, fp32 or bf16, which is overwritten. Beside it there are at most one more
    matrix of its size and two [k, k] with k = min(n, m).
    """
    norm = torch.linalg.vector_norm(matrix, dtype=torch.float32)
    matrix.div_(norm.clamp(min=_SMALLEST_NORM).to(matrix.dtype))
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    other = torch.empty_like(wide)
    square = wide.new_empty(len(wide), len(wide))
    polynomial = torch.empty_like(square)
    first, second, third = _COEFFICIENTS
    for _ in range(_STEPS):
        torch.mm(wide, wide.T, out=square)
        torch.addmm(square, square, square, beta=second, alpha=third, out=polynomial)
        torch.addmm(wide, polynomial, wide, beta=first, out=other)
        wide, other = other, wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
