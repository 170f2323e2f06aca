import pytest
import torch

from megatron_step.ops import AdapterDropout, dropout_mask
from megatron_step.ops.adapter_dropout import drop, dropout_mask_reference


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.999, 1 - 2**-40])
@pytest.mark.parametrize("seed", [0, 1, 2**62 + 5])
@pytest.mark.parametrize(
    ("first_column", "num_columns"),
    [(0, 70), (3, 1000), (2**31 - 80, 2**31 - 1), (2**33 - 3, 2**40), (2**32 - 35, 2**32 + 40)],
)
def test_kernel_and_plain_torch_draw_the_same_mask(kernel, probability, seed, first_column, num_columns):
    dropout = AdapterDropout(probability, seed, first_column, num_columns)
    assert torch.equal(dropout_mask((3, 17, 70), dropout), dropout_mask_reference((3, 17, 70), dropout))


def test_the_mask_is_what_it_always_was(path):
    """A checkpointed run goes on with the same masks on any machine and in any version."""
    mask = dropout_mask((4, 16), AdapterDropout(0.5, 1234, 0, 16))
    assert ["".join("01"[int(kept)] for kept in row > 0) for row in mask] == [
        "1000111001101010",
        "1101001110011110",
        "1010110001111111",
        "1111011010001010",
    ]


def test_ranks_with_parts_of_the_columns_draw_parts_of_one_mask(path):
    whole = dropout_mask((2, 5, 48), AdapterDropout(0.3, 7, 0, 48))
    for size in (1, 2, 3, 16):
        width = 48 // size
        parts = [dropout_mask((2, 5, width), AdapterDropout(0.3, 7, rank * width, 48)) for rank in range(size)]
        assert torch.equal(torch.cat(parts, -1), whole)


def test_later_rows_draw_the_later_part_of_the_mask(path):
    dropout = AdapterDropout(0.3, 7, 0, 48)
    whole = dropout_mask((9, 48), dropout)
    assert torch.equal(drop(torch.ones(4, 48), dropout, first_row=5), whole[5:])


def test_the_mask_is_the_same_on_any_number_of_threads(path, set_threads):
    masks = []
    for threads in (1, 2, 3):
        set_threads(threads)
        masks.append(dropout_mask((301, 257), AdapterDropout(0.3, 7, 0, 257)))
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_dropped_elements_is_the_probability(path, probability):
    # In all, in every row and in every column: a fair draw strays by more than five standard deviations once in 10^6.
    mask = dropout_mask((512, 384), AdapterDropout(probability, 3, 0, 384))
    dropped = mask.eq(0).double()
    for part, number in ((dropped.mean(), dropped.numel()), (dropped.mean(0), 512), (dropped.mean(1), 384)):
        deviation = (probability * (1 - probability) / number) ** 0.5
        assert (part - probability).abs().max() < 5 * deviation + 1 / number
    assert mask.unique().tolist() == pytest.approx([0, 1 / (1 - probability)])


def test_neighbours_and_seeds_are_independent(path):
    def kept(seed):
        return dropout_mask((512, 512), AdapterDropout(0.5, seed, 0, 512)) - 1  # -1 or 1

    mask = kept(5)
    others = [kept(6), kept(5 + 2**32), kept(4)]
    pairs = [(mask, other) for other in others]
    pairs += [(mask[:, :-lag], mask[:, lag:]) for lag in (1, 2, 4, 64, 256)]
    pairs += [(mask[:-lag], mask[lag:]) for lag in (1, 2, 4, 64, 256)]
    for x, y in pairs:
        assert abs((x * y).mean()) < 5 / x.numel() ** 0.5


def test_no_seeds_mask_is_another_in_other_places(path):
    """Seeds that differ in one bit must not give one mask with its elements swapped."""
    first, second = (dropout_mask((1024,), AdapterDropout(0.5, seed, 0, 1024)) - 1 for seed in (8, 9))
    index = torch.arange(1024)
    agreement = (first * second[index ^ index.unsqueeze(1)]).mean(1)  # for each change of the index's bits
    assert agreement.abs().max() < 5 / 1024**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_what_is_kept_is_scaled(path, dtype):
    torch.manual_seed(0)
    x, dropout = torch.randn(7, 40).to(dtype), AdapterDropout(0.25, 1, 4, 100)
    dropped = drop(x[:, :33], dropout)
    assert dropped.dtype == dtype
    assert torch.equal(dropped, (x[:, :33] * dropout_mask((7, 33), dropout)).to(dtype))


def test_no_rows(path):
    assert dropout_mask((0, 4), AdapterDropout(0.1, 0, 0, 4)).shape == (0, 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-0.1, 0, 0, 4), "probability"),
        ((1.0, 0, 0, 4), "probability"),
        ((0.1, -1, 0, 4), "seed"),
        ((0.1, 2**63, 0, 4), "seed"),
        ((0.1, 0, -1, 4), "first_column"),
        ((0.1, 0, 4, 4), "first_column"),
    ],
)
def test_a_value_out_of_range_is_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        AdapterDropout(*values)


def test_columns_beyond_the_whole_are_an_error(path):
    with pytest.raises(ValueError, match="columns 2 to 6, but num_columns is 5"):
        dropout_mask((3, 4), AdapterDropout(0.1, 0, 2, 5))
