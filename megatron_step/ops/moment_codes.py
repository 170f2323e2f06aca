"""Adam's moments in 8 bits, with a bf16 scale for each block of 64 columns of a row.

A code is the root of a value's share x of the block's scale, so that small values keep more of their precision:

    first moment    m = scale * sign * (k / 127)^2    int8 code sign * k
    second moment   v = scale * (k / 255)^4           uint8 code k; a v > 0 has a code of at least 1

The scale is the block's largest magnitude, its peak, rounded up to bf16. Of the two neighbours of a value, random bits
choose one, so that the decoded value is right on average. A second moment above 0 never becomes 0: an update would
divide by epsilon alone.

Blocks lie on the grid of the whole weight, so that every split of it into rectangles [rows, columns] has the same
codes. A rectangle's first block may begin left of its first column, and its last block may end right of its last: the
ranks that share such a block take the largest of their peaks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_step.plan.states import MOMENT_BLOCK

_FIRST_LEVELS, _SECOND_LEVELS = 127.0, 255.0
_SMALLEST_NORMAL, _LARGEST_BF16, _INFINITY, _NAN = 0x00800000, 0x7F7F0000, 0x7F800000, 0x7FC00000  # bits of fp32


def block_count(columns: int, first_column: int) -> int:
    """Blocks in a row of `columns` columns that begins at column `first_column` of the whole weight."""
    return -(-(first_column % MOMENT_BLOCK + columns) // MOMENT_BLOCK) if columns else 0


def block_peaks(values: Tensor, first_column: int) -> Tensor:
    """Return the largest magnitude in each block of fp32 values: [rows, columns] -> [rows, blocks]; NaN counts most."""
    left = first_column % MOMENT_BLOCK
    right = -(left + values.shape[1]) % MOMENT_BLOCK
    return F.pad(values.abs(), (left, right)).unflatten(1, (-1, MOMENT_BLOCK)).amax(-1)


def block_scales(peaks: Tensor) -> Tensor:
    """Return the bf16 scales of fp32 peaks, rounded up; 0 for a peak below the smallest normal number.

    A NaN or an infinity stays, so that it reaches every value of its block and is seen.
    """
    bits = peaks.view(torch.int32)
    finite = ((bits + 0xFFFF) & -0x10000).clamp(max=_LARGEST_BF16)
    scale_bits = torch.where(bits < _INFINITY, finite, torch.where(bits == _INFINITY, _INFINITY, _NAN))
    scale_bits = torch.where(bits < _SMALLEST_NORMAL, 0, scale_bits).int()
    return scale_bits.view(torch.float32).bfloat16()


def encode_first(moment: Tensor, scales: Tensor, random: Tensor, first_column: int) -> Tensor:
    """Return the int8 codes of fp32 first moments.

    Shapes: moment and random [rows, columns], scales [rows, blocks]. `random` numbers are from 0 to 2^16 - 1.
    """
    root = exact_root(moment.abs()) * _over_root(_FIRST_LEVELS, scales, moment, first_column)
    k = root.trunc()
    code = _round(k, k + (k + 1), (root - k) * (root + k), random, _FIRST_LEVELS)
    return torch.where(moment < 0, -code, code).to(torch.int8)


def encode_second(moment: Tensor, scales: Tensor, random: Tensor, first_column: int) -> Tensor:
    """Return the uint8 codes of fp32 second moments; arguments as for `encode_first`."""
    square = exact_root(moment) * _over_root(_SECOND_LEVELS**2, scales, moment, first_column)
    k = exact_root(square).trunc()
    lower, upper = k * k, (k + 1) * (k + 1)
    step, rest = (upper - lower) * (upper + lower), (square - lower) * (square + lower)
    code = _round(k, step, rest, random, _SECOND_LEVELS)
    return torch.where((moment > 0) & (code < 1), 1, code).to(torch.uint8)


def decode_first(codes: Tensor, scales: Tensor, first_column: int) -> Tensor:
    """Return the fp32 first moments: codes [rows, columns], scales [rows, blocks]."""
    root = codes.float() * _of_elements(exact_root(scales.float()) * (1 / _FIRST_LEVELS), codes, first_column)
    return root * root.abs()


def decode_second(codes: Tensor, scales: Tensor, first_column: int) -> Tensor:
    """Return the fp32 second moments; arguments as for `decode_first`."""
    unit = exact_root(exact_root(scales.float())) * (1 / _SECOND_LEVELS)
    square = (codes.float() * _of_elements(unit, codes, first_column)) ** 2
    return square * square


def exact_root(values: Tensor) -> Tensor:
    """Return the square roots of fp32 values, each rounded to nearest; torch's own can err in the last bit (MKL)."""
    return values.double().sqrt().float()


def _round(k: Tensor, step: Tensor, rest: Tensor, random: Tensor, levels: float) -> Tensor:
    """The code k, or the next with a probability of rest / step."""
    code = torch.where((random.float() + 0.5) * step < 65536 * rest, k + 1, k)
    return code.clamp(max=levels).nan_to_num(0)  # a NaN's scale is NaN, whatever its code


def _over_root(levels: float, scales: Tensor, elements: Tensor, first_column: int) -> Tensor:
    """The quotient levels / sqrt(scale) for each element, and 0 where the scale is 0."""
    scales = scales.float()
    return _of_elements(torch.where(scales == 0, 0.0, levels / exact_root(scales)), elements, first_column)


def _of_elements(values: Tensor, elements: Tensor, first_column: int) -> Tensor:
    """The value of each element's block: [rows, blocks] -> [rows, columns]."""
    left = first_column % MOMENT_BLOCK
    return values.repeat_interleave(MOMENT_BLOCK, 1)[:, left : left + elements.shape[1]]
