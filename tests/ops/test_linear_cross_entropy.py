import functools
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_step.ops import linear_cross_entropy
from megatron_step.ops.linear_cross_entropy import linear_cross_entropy_reference


def case(tokens: tuple[int, ...], h: int, v: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, weight and labels, some of them to be ignored."""
    torch.manual_seed(0)
    labels = torch.randint(0, vocab_size, tokens)
    labels.view(-1)[1::4] = -100
    return torch.randn(*tokens, h), torch.randn(v, h), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "h", "v", "vocab_size"),
    [((1,), 1, 1, 1), ((6,), 8, 37, 37), ((5, 3), 16, 64, 50), ((70,), 32, 1000, 999)],
)
def test_error_is_at_most_twice_that_of_torch(path, assert_as_exact_as_torch, tokens, h, v, vocab_size, dtype):
    hidden, weight, labels = case(tokens, h, v, vocab_size)
    operation = functools.partial(linear_cross_entropy, labels=labels, vocab_size=vocab_size)
    reference = functools.partial(linear_cross_entropy_reference, labels=labels, vocab_size=vocab_size)

    def in_float32(*inputs: torch.Tensor) -> torch.Tensor:
        losses = reference(*inputs)
        return losses if losses.dtype == torch.float64 else losses.float()

    assert_as_exact_as_torch(operation, in_float32, [hidden.to(dtype), weight.to(dtype)])


def test_bf16_weights_compute_in_fp32(path, assert_bf16_weights_compute_in_fp32):
    hidden, weight, labels = case((5, 3), 16, 64, 50)
    operation = functools.partial(linear_cross_entropy, labels=labels, vocab_size=50)
    assert_bf16_weights_compute_in_fp32(operation, hidden, [weight])


def test_ignored_labels_and_padding_have_no_gradient(path):
    hidden, weight, labels = (x.requires_grad_(x.is_floating_point()) for x in case((9,), 8, 24, 20))
    losses = linear_cross_entropy(hidden, weight, labels, vocab_size=20)
    losses.sum().backward()
    assert losses[1::4].eq(0).all()
    assert hidden.grad[1::4].eq(0).all()
    assert hidden.grad[0::4].ne(0).any()
    assert weight.grad[20:].eq(0).all()
    assert weight.grad[:20].ne(0).any()


def test_large_logits_do_not_overflow(path):
    hidden, weight, labels = case((9,), 8, 24, 24)
    losses = linear_cross_entropy(1000 * hidden, weight, labels)
    torch.testing.assert_close(losses, linear_cross_entropy_reference(1000 * hidden, weight, labels))


def test_frozen_output_layer(path):
    hidden, weight, labels = case((9,), 8, 24, 24)
    linear_cross_entropy(hidden.requires_grad_(), weight, labels).sum().backward()
    assert weight.grad is None
    assert hidden.grad.ne(0).any()


def test_second_backward_is_an_error(path):
    hidden, weight, labels = case((4,), 8, 24, 24)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        loss.backward()


def test_strided_inputs(path):
    hidden, weight, labels = case((5, 6), 8, 24, 24)
    expected = linear_cross_entropy_reference(hidden, weight, labels)
    flipped = linear_cross_entropy(hidden.transpose(0, 1), weight.t().contiguous().t(), labels.t())
    torch.testing.assert_close(flipped.t(), expected)


def test_threads(kernel, set_threads):
    torch.manual_seed(0)
    logits, labels = torch.randn(37, 90), torch.randint(0, 90, (37,))
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        gradient, scale = logits.clone(), torch.ones(37)
        statistics = torch.ops.megatron_step.cross_entropy_forward(logits, labels, 88)
        torch.ops.megatron_step.cross_entropy_backward_(gradient, labels, *statistics[:2], scale, 88)
        results.append((statistics, gradient))
    for statistics, gradient in results[1:]:
        assert torch.equal(statistics, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize(
    ("hidden", "weight", "labels", "message"),
    [
        (torch.ones(3, 8), torch.ones(10, 7), torch.zeros(3, dtype=torch.int64), "must agree"),
        (torch.ones(3, 8).bfloat16(), torch.ones(10, 8), torch.zeros(3, dtype=torch.int64), "must agree"),
        (torch.ones(3, 8), torch.ones(10, 8), torch.zeros(4, dtype=torch.int64), "labels must be"),
        (torch.ones(3, 8), torch.ones(10, 8), torch.zeros(3), "labels must be"),
        (torch.ones(3, 8), torch.ones(10, 8), torch.full((3,), 10), "not below vocab_size = 10"),
    ],
)
def test_wrong_input_is_an_error(path, hidden, weight, labels, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, labels)


# The vocabulary of 2 x 32 rows: no padding; padding on the last rank; a rank that holds nothing but padding.
VOCAB_SIZES = (64, 50, 30)


def compare_split_with_whole(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(minutes=5))
    group = dist.group.WORLD
    try:
        for vocab_size in VOCAB_SIZES:
            hidden, weight, labels = case((13,), 16, 64, vocab_size)
            mine = slice(32 * rank, 32 * rank + 32)
            part, local = hidden.clone().requires_grad_(), weight[mine].clone().requires_grad_()
            losses = linear_cross_entropy(
                part, local, labels, vocab_size=vocab_size, vocab_start=32 * rank, group=group
            )
            losses.square().sum().backward()
            dist.all_reduce(part.grad, group=group)
            hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
            expected = linear_cross_entropy_reference(hidden, weight, labels, vocab_size=vocab_size)
            expected.square().sum().backward()
            torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(part.grad.double(), hidden.grad, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(local.grad.double(), weight.grad[mine], rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="vocab_size is None"):
            linear_cross_entropy(part, local, labels, group=group)
    finally:
        dist.destroy_process_group()


def test_vocabulary_split_over_two_ranks():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(compare_split_with_whole, args=(port,), nprocs=2)
