import pytest
import torch

from megatron_step import ops
from megatron_step.ops import AdapterDropout, adapter_linear
from megatron_step.ops.adapter_linear import adapter_linear_reference

# Rows of x, then k, n and r. One is wide enough for the mask to be drawn in several blocks of rows; the last two have
# several parts of a sum over rows and of a row, none of them whole, and a rank of more than one vector.
SHAPES = [
    ((5,), 3, 2, 1),
    ((3, 4), 40, 7, 3),
    ((64,), 17, 50, 16),
    ((2, 8), 33, 33, 40),
    ((3, 20), 5472, 24, 8),
    ((531,), 37, 1101, 8),
    ((2, 270), 20, 535, 29),
]


def operands(rows, k, n, r, dtype=torch.float32):
    """x [..., k], W [n, k], A [r, k] and B [n, r] with products of about one, so that the adapter counts in y."""
    torch.manual_seed(0)
    x, weight, a, b = torch.randn(*rows, k), torch.randn(n, k) / k**0.5, torch.randn(r, k) / k**0.5, torch.randn(n, r)
    return [tensor.to(dtype) for tensor in (x, weight, a, b)]


def dropout_for(x, probability=0.3):
    return AdapterDropout(probability, seed=11, first_column=2, num_columns=x.shape[-1] + 5)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "k", "n", "r"), SHAPES)
def test_error_is_at_most_twice_that_of_torch(path, assert_as_exact_as_torch, rows, k, n, r, dtype, dropped):
    x, weight, a, b = operands(rows, k, n, r, dtype)
    dropout = dropout_for(x) if dropped else None

    def ours(x, a, b):
        return adapter_linear(x, weight, a, b, 0.7, dropout)

    def reference(x, a, b):
        return adapter_linear_reference(x, weight.to(x.dtype), a, b, 0.7, dropout)

    assert_as_exact_as_torch(ours, reference, [x, a, b])


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("r", [8, 40])
def test_bf16_weights_compute_in_fp32(path, assert_bf16_weights_compute_in_fp32, r, dropped):
    x, weight, a, b = operands((6, 4), 40, 70, r)
    dropout, frozen = dropout_for(x) if dropped else None, weight.bfloat16()

    def ours(x, a, b):
        return adapter_linear(x, frozen.to(a.dtype), a, b, 0.7, dropout)

    assert_bf16_weights_compute_in_fp32(ours, x, [a, b])


def test_gradients_are_the_same_on_any_number_of_threads(kernel, set_threads):
    _, _, _, b = operands((531,), 1, 1101, 16)
    dy, u = torch.randn(531, 1101), torch.randn(531, 16)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(ops.adapter_output_gradients(dy, u, b, 0.7))
    for du, db in results[1:]:
        assert torch.equal(du, results[0][0])
        assert torch.equal(db, results[0][1])


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_run_as_plain_torch(path, dtype, dropped):
    x, weight, a, b = operands((3, 4), 40, 7, 3, dtype)
    for leaf in (x, a, b):
        leaf.requires_grad_()
    dropout = dropout_for(x) if dropped else None
    y, expected = (f(x, weight, a, b, 0.5, dropout) for f in (adapter_linear, adapter_linear_reference))
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(y, expected, **tolerance)
    for ours, other in zip(*(torch.autograd.grad(z.sum(), (x, a, b)) for z in (y, expected))):
        torch.testing.assert_close(ours, other, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "k", "n", "r"), [*SHAPES, ((16, 8), 256, 512, 16), ((300,), 320, 200, 128)])
def test_a_fresh_adapter_changes_no_bit(path, rows, k, n, r, dtype):
    x, weight, a, b = operands(rows, k, n, r, dtype)
    u = ops.adapter_shrink(x, a, dropout_for(x))
    assert u.dtype == torch.float32
    y = ops.adapter_output(x, weight, u, torch.zeros_like(b), 3.0)
    assert torch.equal(y, ops.linear_output(x, weight))


def whole_and_parts(dtype):
    """y, dx, dA and dB of one rank, and the operands from which two ranks compute them."""
    x, weight, a, b = operands((6, 5), 24, 32, 4, dtype)
    dy = torch.randn(6, 5, 32).to(dtype)
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    y = adapter_linear(leaves[0], weight, *leaves[1:], 0.5, AdapterDropout(0.4, 9, 0, 24))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)], (x, weight, a, b, dy)


def assert_equal_but_for_rounding(ours, expected):
    for mine, other in zip(ours, expected, strict=True):
        assert mine.dtype == other.dtype
        assert (mine - other).norm() <= 2 * torch.finfo(other.dtype).eps * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_with_parts_of_the_outputs_make_the_whole(path, dtype):
    expected, (x, weight, a, b, dy) = whole_and_parts(dtype)
    dropout, n = AdapterDropout(0.4, 9, 0, 24), (slice(0, 16), slice(16, 32))
    u = ops.adapter_shrink(x, a, dropout)
    y = torch.cat([ops.adapter_output(x, weight[part], u, b[part], 0.5) for part in n], -1)
    (du_0, db_0), (du_1, db_1) = (ops.adapter_output_gradients(dy[..., part], u, b[part], 0.5) for part in n)
    dx = sum(
        ops.adapter_input_gradient(dy[..., part], weight[part], du, a, dropout) for part, du in zip(n, (du_0, du_1))
    )
    da = ops.adapter_shrink_gradient(du_0 + du_1, x, dropout, dtype)
    assert_equal_but_for_rounding([y, dx, da, torch.cat([db_0, db_1])], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_with_parts_of_the_inputs_make_the_whole(path, dtype):
    expected, (x, weight, a, b, dy) = whole_and_parts(dtype)
    k = {part: AdapterDropout(0.4, 9, part.start, 24) for part in (range(12), range(12, 24))}
    us = [ops.adapter_shrink(x[..., part], a[:, part], dropout) for part, dropout in k.items()]
    y = sum(ops.adapter_output(x[..., part], weight[:, part], u, b, 0.5) for part, u in zip(k, us))
    du, db = ops.adapter_output_gradients(dy, us[0] + us[1], b, 0.5)
    dx = torch.cat(
        [ops.adapter_input_gradient(dy, weight[:, part], du, a[:, part], dropout) for part, dropout in k.items()], -1
    )
    da = torch.cat([ops.adapter_shrink_gradient(du, x[..., part], dropout, dtype) for part, dropout in k.items()], -1)
    assert_equal_but_for_rounding([y, dx, da, db], expected)


def test_gradients_have_the_types_asked_for(path):
    x, _, a, b = operands((6,), 8, 5, 2, torch.bfloat16)
    u, dy = ops.adapter_shrink(x, a, None), torch.randn(6, 5).bfloat16()
    du, db = ops.adapter_output_gradients(dy, u, b, 0.5)
    assert du.dtype == torch.float32
    assert db.dtype == torch.bfloat16
    assert ops.adapter_shrink_gradient(du, x, None, torch.float32).dtype == torch.float32
    assert ops.adapter_output_gradients(dy, None, b, 0.5, need_db=False)[1] is None
    assert ops.adapter_output_gradients(dy, u, b, 0.5, need_du=False)[0] is None


@pytest.mark.parametrize("trainable", ["x", "a", "b", "xa", "ab", "xab"])
def test_only_what_the_gradients_need_is_kept(path, trainable):
    leaves = dict(zip(("x", "weight", "a", "b"), operands((3, 4), 40, 7, 3)))
    x, weight, a, b = leaves.values()
    for name in trainable:
        leaves[name].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        y = adapter_linear(x, weight, a, b, 0.5, dropout_for(x))
    operand_pointers = {t.data_ptr() for t in leaves.values()}
    assert (x.data_ptr() in saved) == ("a" in trainable)
    assert len(set(saved) - operand_pointers) == ("b" in trainable)  # u, and nothing else
    expected = adapter_linear_reference(x, weight, a, b, 0.5, dropout_for(x))
    wanted = [leaves[name] for name in trainable]
    for ours, other in zip(*(torch.autograd.grad(z.sum(), wanted) for z in (y, expected))):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("dropped", [False, True])
def test_strided_operands(path, dropped):
    torch.manual_seed(0)
    x, dy = torch.randn(10, 4, 6).transpose(0, 2), torch.randn(4, 6, 12).transpose(0, 1)
    weight, a, b = torch.randn(10, 12).t(), torch.randn(10, 6)[:, ::2].t(), torch.randn(3, 12).t()
    x, a, b = (t.detach().requires_grad_() for t in (x, a, b))
    dropout = dropout_for(x) if dropped else None
    y, expected = (f(x, weight, a, b, 0.5, dropout) for f in (adapter_linear, adapter_linear_reference))
    torch.testing.assert_close(y, expected)
    for ours, other in zip(*(torch.autograd.grad(z, (x, a, b), dy) for z in (y, expected))):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropped", [False, True])
def test_no_rows(path, dropped, dtype):
    x, weight, a, b = operands((2, 0), 8, 5, 3, dtype)
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    y = adapter_linear(x, weight, a, b, 0.5, dropout_for(x) if dropped else None)
    assert y.shape == (2, 0, 5)
    dx, da, db = torch.autograd.grad(y.sum(), (x, a, b))
    assert dx.shape == x.shape
    assert torch.equal(da, torch.zeros_like(a))
    assert torch.equal(db, torch.zeros_like(b))


def test_x_without_leading_dimensions(path):
    x, weight, a, b = operands((), 8, 5, 3)
    torch.testing.assert_close(adapter_linear(x, weight, a, b, 0.5), adapter_linear_reference(x, weight, a, b, 0.5))


def test_operations_are_traced_as_one_graph(kernel):
    x, weight, a, b = operands((6,), 8, 5, 2)
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    dropout = dropout_for(x)
    compiled = torch.compile(adapter_linear, backend="aot_eager", fullgraph=True)(x, weight, a, b, 0.5, dropout)
    expected = adapter_linear(x, weight, a, b, 0.5, dropout)
    torch.testing.assert_close(compiled, expected)
    for ours, other in zip(*(torch.autograd.grad(z.sum(), (x, a, b)) for z in (compiled, expected))):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize(
    "shapes",
    [
        {"x": (3, 5)},
        {"x": ()},
        {"weight": (4,)},
        {"a": (2, 5)},
        {"a": (2,)},
        {"b": (6, 3)},
        {"b": (7, 2)},
        {"a": (0, 4), "b": (6, 0)},
    ],
)
def test_wrong_shape_is_an_error(path, shapes):
    x, weight, a, b = (
        torch.ones(shapes.get(name, shape))
        for name, shape in {"x": (3, 4), "weight": (6, 4), "a": (2, 4), "b": (6, 2)}.items()
    )
    with pytest.raises(ValueError, match="must agree in k, n, r > 0, type and device"):
        adapter_linear(x, weight, a, b, 1.0)


def test_mixed_types_an_unfrozen_weight_and_a_wrong_dropout_are_errors(path):
    x, weight, a, b = operands((3,), 4, 6, 2)
    with pytest.raises(ValueError, match="must agree in k, n, r > 0, type and device: .*bfloat16"):
        adapter_linear(x.bfloat16(), weight, a.bfloat16(), b, 1.0)
    with pytest.raises(ValueError, match="columns 3 to 7, but num_columns is 6"):
        adapter_linear(x, weight, a, b, 1.0, AdapterDropout(0.1, 0, 3, 6))
    with pytest.raises(ValueError, match="must be frozen"):
        adapter_linear(x, weight.requires_grad_(), a, b, 1.0)
