"""The orthogonal matrix is Newton-Schulz's polynomial of the singular values."""

import pytest
import torch

from megatron_step.ops.newton_schulz import orthogonalize


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (1, 7), (7, 1)])
def test_it_is_the_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, values, right = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert torch.allclose(orthogonalize(matrix.clone()).double(), left * values @ right, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_are_near_one_at_any_size_of_the_matrix(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    left, _ = torch.linalg.qr(torch.randn(64, 64, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(96, 64, generator=generator))
    for size in (1e-12, 1.0, 1e6):
        matrix = (size * (left * torch.linspace(0.05, 1, 64)) @ right.T).to(dtype)
        values = torch.linalg.svdvals(orthogonalize(matrix).float())
        assert 0.6 < values.min() < values.max() < 1.3


def test_a_zero_matrix_stays_zero_and_the_result_is_contiguous() -> None:
    assert not orthogonalize(torch.zeros(4, 6)).any()
    for shape in ((3, 5), (5, 3)):
        assert orthogonalize(torch.ones(shape)).is_contiguous()
