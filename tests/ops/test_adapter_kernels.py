"""The CUDA kernels of the adapter linear through our own operation: emulated, and on a GPU where there is one."""

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
from emulation import sanitized
from emulation.build import emulated_operators, emulation_works
from emulation.sanitized import run_sanitized

from megatron_step import ops
from megatron_step.ops import AdapterDropout, adapter_linear, dispatch, fakes
from megatron_step.ops.adapter_linear import adapter_linear_reference

ORDERS = {"forward": 0, "reverse": 1, "random": 2}
# Tokens, k, n, r: around the edges of tiles (64 tokens, 64 or 128 columns, ranks by 16), rows at multiples of 16 bytes
# and not, several parts of a sum (more than 256 columns or tokens), and the limits between the ways to compute.
SHAPES = [
    (1, 1, 1, 1),
    (5, 3, 2, 1),
    (64, 64, 128, 16),
    (65, 72, 136, 17),
    (3, 129, 257, 32),
    (300, 40, 24, 8),
    (20, 328, 520, 33),
    (130, 77, 67, 40),
    (66, 64, 40, 256),
    (4, 16, 24, 300),
]
TESTED = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[*(f"emulated, {order}" for order in ORDERS), *(["cuda"] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Device of the kernels: a GPU, or the emulation with one of its orders."""
    if request.param == "cuda":
        if not dispatch.cuda_extension_available():
            pytest.skip("the extension is built without the CUDA kernels")
        yield torch.device("cuda")
        return
    set_order = emulate(monkeypatch)
    set_order(ORDERS[request.param.removeprefix("emulated, ")])
    yield torch.device("cpu")
    set_order(0)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated kernels in one order."""
    emulate(monkeypatch)


def emulate(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have CPU tensors taken for a GPU's; returns what sets the order of threads."""
    if not (emulation_works() and dispatch.extension_available()):
        pytest.skip("the emulation needs g++ on x86-64, and the C++ extension")
    library = ctypes.CDLL(str(emulated_operators()))
    monkeypatch.setattr(dispatch, "CUDA_KERNEL_DEVICE", "cpu")
    monkeypatch.setattr(dispatch, "cuda_extension_available", lambda: True)
    return library.set_order


def operands(shape, dtype, device):
    """x [t, k], W [n, k], A [r, k] and B [n, r] with products of about one, so that the adapter counts in y."""
    t, k, n, r = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(t, k, 1.0), (n, k, k**-0.5), (r, k, k**-0.5), (n, r, r**-0.5)]
    return [
        (torch.randn(rows, columns, generator=generator) * scale).to(device, dtype) for rows, columns, scale in sizes
    ]


def dropout_for(x, probability=0.3):
    return AdapterDropout(probability, seed=11, first_column=2, num_columns=x.shape[-1] + 5)


def ours_and_reference(shape, dtype, device, dropped):
    """Two functions of x, A and B, and those."""
    x, weight, a, b = operands(shape, dtype, device)
    dropout = dropout_for(x) if dropped else None

    def ours(x, a, b):
        return adapter_linear(x, weight, a, b, 0.7, dropout)

    def reference(x, a, b):
        return adapter_linear_reference(x, weight.to(x.dtype), a, b, 0.7, dropout)

    return ours, reference, [x, a, b]


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("dtype", TESTED)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_that_of_torch(device, assert_as_exact_as_torch, shape, dtype, dropped):
    assert_as_exact_as_torch(*ours_and_reference(shape, dtype, device, dropped))


@pytest.mark.parametrize("r", [8, 40])
def test_results_are_the_same_bits_every_time(device, r):
    x, weight, a, b = operands((300, 328, 300, r), torch.bfloat16, device)
    dropout, dy = dropout_for(x), torch.randn(300, 300, generator=torch.Generator().manual_seed(1)).to(x)
    first, second = ([*pieces(x, weight, a, b, dropout, dy)] for _ in range(2))
    for one, other in zip(first, second):
        assert torch.equal(one, other)


def pieces(x, weight, a, b, dropout, dy):
    """u, y, du, dB, dx and dA."""
    u = ops.adapter_shrink(x, a, dropout)
    yield u
    yield ops.adapter_output(x, weight, u, b, 0.5)
    du, db = ops.adapter_output_gradients(dy, u, b, 0.5)
    yield from (du, db)
    yield ops.adapter_input_gradient(dy, weight, du, a, dropout)
    yield ops.adapter_shrink_gradient(du, x, dropout, torch.float32)


@pytest.mark.parametrize("first_column", [0, 24])
def test_ranks_with_parts_of_the_inputs_draw_parts_of_the_mask_that_the_cpu_draws(device, first_column):
    x = torch.ones(70, 24, device=device)
    identity = torch.eye(24, device=device)
    dropout = AdapterDropout(0.4, 2**62 + 5, first_column, 48)
    expected = ops.adapter_dropout.dropout_mask_reference((70, 24), dropout, device)
    assert torch.equal(ops.adapter_shrink(x, identity, dropout), expected)
    zero = torch.zeros(24, 24, device=device)
    assert torch.equal(ops.adapter_input_gradient(x, zero, x, identity, dropout), expected)
    assert torch.equal(ops.adapter_shrink_gradient(torch.eye(70, device=device), x, dropout, torch.float32), expected)


def test_indices_beyond_32_bits_draw_the_same_mask(device):
    x, identity = torch.ones(5, 40, device=device), torch.eye(40, device=device)
    dropout = AdapterDropout(0.5, 3, 2**32 - 20, 2**33)
    expected = ops.adapter_dropout.dropout_mask_reference((5, 40), dropout, device)
    assert torch.equal(ops.adapter_shrink(x, identity, dropout), expected)


@pytest.mark.parametrize("dtype", TESTED)
@pytest.mark.parametrize("r", [3, 40])
def test_a_fresh_adapter_adds_nothing(device, dtype, r):
    x, weight, a, b = operands((70, 40, 56, r), dtype, device)
    y = adapter_linear(x, weight, a, torch.zeros_like(b), 3.0)
    torch.testing.assert_close(y, x @ weight.t())


def test_only_the_gradients_asked_for_are_made(emulated):
    x, _, a, b = operands((5, 8, 6, 2), torch.bfloat16, "cpu")
    dy = torch.randn(5, 6).bfloat16()
    du, db = ops.adapter_output_gradients(dy, None, b, 0.5, need_db=False)
    assert du.dtype == torch.float32
    assert db is None
    assert ops.adapter_output_gradients(dy, ops.adapter_shrink(x, a, None), b, 0.5)[1].dtype == torch.bfloat16


@pytest.mark.parametrize("dropped", [False, True])
def test_strided_operands_and_leading_dimensions(device, dropped):
    torch.manual_seed(0)
    x, dy = torch.randn(10, 4, 6).transpose(0, 2), torch.randn(4, 6, 12).transpose(0, 1)
    weight, a, b = torch.randn(10, 12).t(), torch.randn(10, 6)[:, ::2].t(), torch.randn(3, 12).t()
    x, weight, a, b, dy = (t.to(device) for t in (x, weight, a, b, dy))
    x, a, b = (t.detach().requires_grad_() for t in (x, a, b))
    dropout = dropout_for(x) if dropped else None
    y, expected = (f(x, weight, a, b, 0.5, dropout) for f in (adapter_linear, adapter_linear_reference))
    torch.testing.assert_close(y, expected)
    for ours, other in zip(*(torch.autograd.grad(z, (x, a, b), dy) for z in (y, expected))):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("dtype", TESTED)
def test_no_rows(emulated, dtype):
    x, weight, a, b = operands((0, 8, 5, 3), dtype, "cpu")
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    y = adapter_linear(x, weight, a, b, 0.5, dropout_for(x))
    assert y.shape == (0, 5)
    dx, da, db = torch.autograd.grad(y.sum(), (x, a, b))
    assert dx.shape == x.shape
    assert torch.equal(da, torch.zeros_like(a))
    assert torch.equal(db, torch.zeros_like(b))


def test_gradients_accumulate_and_recompute_gives_the_same(emulated):
    ours, _, leaves = ours_and_reference((20, 24, 16, 8), torch.bfloat16, "cpu", True)
    once, twice = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
    ours(*once).sum().backward()
    for _ in range(2):
        torch.utils.checkpoint.checkpoint(ours, *twice, use_reentrant=False).sum().backward()
    for one, two in zip(once, twice):
        assert torch.equal(two.grad, one.grad + one.grad)


def test_operations_are_traced_as_one_graph(emulated):
    ours, _, leaves = ours_and_reference((6, 8, 5, 2), torch.float32, "cpu", True)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)(*leaves)
    expected = ours(*leaves)
    torch.testing.assert_close(compiled, expected)
    for mine, other in zip(*(torch.autograd.grad(z.sum(), leaves) for z in (compiled, expected))):
        torch.testing.assert_close(mine, other)


def operator_arguments(dtype):
    """Small valid arguments of every operator."""
    x, _, a, b = operands((6, 8, 5, 2), dtype, "cpu")
    dy, u = torch.randn(6, 5).to(dtype), torch.randn(6, 2)
    return {
        "adapter_shrink": (x, a, 0.1, 3, 8, 16),
        "adapter_expand": (u, b, False, 0.5, 0.0, 0, 0, 5),
        "adapter_output_gradients": (dy, u, b, 0.5),
        "adapter_shrink_gradient": (u, x, 0.1, 3, 8, 16),
    }


@pytest.mark.parametrize("dtype", TESTED)
@pytest.mark.parametrize("name", [fake.__name__ for fake in fakes.CUDA_FAKES])
def test_fake_kernel_agrees_with_the_real_one(emulated, name, dtype):
    operator = getattr(torch.ops.megatron_step, name).default
    torch.library.opcheck(operator, operator_arguments(dtype)[name], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("adapter_shrink", 0, torch.ones(6, 8).double(), "takes float32, bfloat16 or float16, not Double"),
        ("adapter_shrink", 1, torch.ones(2, 8).half(), "a must be Float, not Half"),
        ("adapter_shrink", 1, torch.ones(2, 9), "differ in columns"),
        ("adapter_shrink", 0, torch.ones(8, 6).t(), "without gaps"),
        ("adapter_shrink", 0, torch.ones(6), "must be a matrix"),
        ("adapter_expand", 0, torch.ones(6, 2).half(), "u must be Float"),
        ("adapter_expand", 0, torch.ones(6, 3), "differ in rank"),
        ("adapter_output_gradients", 0, torch.ones(6, 4), "differ in outputs"),
        ("adapter_output_gradients", 1, torch.ones(5, 2), "does not fit"),
        ("adapter_shrink_gradient", 0, torch.ones(7, 2), "differ in tokens"),
    ],
)
def test_an_operator_refuses_what_its_kernel_cannot_read(emulated, name, place, value, message):
    arguments = list(operator_arguments(torch.float32)[name])
    arguments[place] = value
    if value.dtype == torch.float64:
        arguments[1] = arguments[1].double()
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.megatron_step, name)(*arguments)


def test_operands_on_two_devices_are_an_error():
    x, weight, a, b = operands((3, 4, 6, 2), torch.float32, "cpu")
    with pytest.raises(ValueError, match="must agree in k, n, r > 0, type and device: .*meta"):
        adapter_linear(x, weight, a.to("meta"), b, 1.0)


def test_sanitizers_find_nothing(emulated):
    done = run_sanitized(sanitized.__file__, str(emulated_operators(sanitized=True)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all shapes computed" in done.stdout
