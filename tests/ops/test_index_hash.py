import torch

from megatron_step.ops.index_hash import element_indices, mixed_seed, random_bits


def test_the_bits_are_what_they_always_were():
    """A checkpointed run goes on with the same bits on any machine and in any version."""
    assert random_bits(1234, torch.tensor([0, 1, 2**31, 2**40 + 7])).tolist() == [
        2249228942,
        38835071,
        1112921900,
        3877678358,
    ]
    assert mixed_seed(0) == 0xE220A8397B1DCDAF  # the first output of SplitMix64, as published


def test_indices_count_through_the_whole():
    assert element_indices(2, 3, 12, 10).tolist() == [[12, 13, 14], [22, 23, 24]]


def test_every_bit_is_fair_and_independent_of_the_others_and_of_other_seeds():
    def signs(seed: int) -> torch.Tensor:
        bits = random_bits(seed, torch.arange(2**16)).unsqueeze(1) >> torch.arange(32) & 1
        return bits.double() * 2 - 1  # [indices, 32]

    own, other = signs(5), signs(6)
    bound = 5.5 / 2**8  # a fair draw of 2^16 strays further once in 10^7
    assert own.mean(0).abs().max() < bound
    assert (own.T @ own / len(own) - torch.eye(32)).abs().max() < bound
    assert (own.T @ other / len(own)).abs().max() < bound
