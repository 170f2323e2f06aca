"""Random bits of an element from a seed and the element's index; csrc/index_hash.h has the same hash, bit for bit."""

import torch
from torch import Tensor

_WORD = 2**32 - 1


def mixed_seed(seed: int) -> int:
    """Return 64 mixed bits of a seed (SplitMix64, Steele et al., 2014); seeds are taken modulo 2^64."""
    z = (seed + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def step_seed(seed: int, step: int) -> int:
    """Return the seed of a weight's random bits in a step, below 2^63, as operations take it."""
    return mixed_seed(mixed_seed(seed) + step) % 2**63


def element_indices(
    rows: int, columns: int, first_index: int, row_stride: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return first_index + i * row_stride + j in int64 [rows, columns]: indices in a whole of `row_stride` columns."""
    row = torch.arange(rows, device=device) * row_stride + first_index
    return row.unsqueeze(1) + torch.arange(columns, device=device)


def random_bits(seed: int, index: Tensor) -> Tensor:
    """Return 32 random bits for each index (int64, at least 0), as int64 from 0 to 2^32 - 1: uint32 lacks operations.

    The bits depend on the seed and the index alone. Bits of different seeds are independent.
    """
    mixed = mixed_seed(seed)
    seed_low, seed_high = mixed & _WORD, mixed >> 32
    # The rounds of triple32 (https://github.com/skeeto/hash-prospector). The upper words of seed and index are added
    # after the first round, so that one seed's bits are not a permutation of another's.
    h = (index & _WORD) ^ seed_low
    h = ((h ^ (h >> 17)) * 0xED5AD4BB) & _WORD
    h = ((h ^ (h >> 11)) + seed_high + (index >> 32) * 0x9E3779B9) & _WORD
    h = (h * 0xAC4C1B51) & _WORD
    h = ((h ^ (h >> 15)) * 0x31848BAB) & _WORD
    return h ^ (h >> 14)
