"""Torch's operations without a public name are there and compute what we use them for."""

import pytest
import torch

from megatron_step.engine.compat import operations


def test_fused_adamw_is_adamw() -> None:
    weight, gradient = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    peer = torch.nn.Parameter(weight.clone())
    peer.grad = gradient
    torch.optim.AdamW([peer], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2).step()
    operations.fused_adamw_(
        [weight],
        [gradient],
        [torch.zeros_like(weight)],
        [torch.zeros_like(weight)],
        [],
        [torch.tensor(1.0)],
        lr=0.1,
        beta1=0.8,
        beta2=0.9,
        weight_decay=0.2,
        eps=1e-3,
        amsgrad=False,
        maximize=False,
    )
    torch.testing.assert_close(weight, peer.detach())


def test_foreach_mul_multiplies_each_in_place() -> None:
    tensors = [torch.ones(2), torch.full((3, 1), 4.0)]
    operations.foreach_mul_(tensors, 0.5)
    assert [tensor.flatten().tolist() for tensor in tensors] == [[0.5, 0.5], [2.0, 2.0, 2.0]]


def test_assert_async_stops_where_the_condition_is_false() -> None:
    operations.assert_async(torch.tensor(True), "fits")
    with pytest.raises(RuntimeError, match="does not fit"):
        operations.assert_async(torch.tensor(False), "does not fit")


def test_has_kernel_sees_a_kernel_once_it_is_there() -> None:
    library = torch.library.Library("megatron_step_compat_test", "DEF")
    library.define("operation(Tensor x) -> Tensor")
    assert not operations.has_kernel("megatron_step_compat_test::operation", "CPU")
    library.impl("operation", torch.clone, "CPU")
    assert operations.has_kernel("megatron_step_compat_test::operation", "CPU")
    assert not operations.has_kernel("megatron_step_compat_test::operation", "CUDA")


@pytest.mark.skipif(not operations.has_onednn_linear(), reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("transposed", [False, True])
def test_onednn_linear_is_the_product(transposed: bool) -> None:
    x, weight = torch.randn(6, 4), torch.randn(5, 4)
    if transposed:
        x, weight = x.t().contiguous().t(), weight.t().contiguous().t()
    torch.testing.assert_close(operations.onednn_linear(x, weight), x @ weight.t())


@pytest.mark.parametrize(
    ("capability", "variables", "uses"),
    [
        ("AVX512", {}, True),
        ("AVX512", {"ONEDNN_MAX_CPU_ISA": "avx512_core", "DNNL_MAX_CPU_ISA": "AVX2"}, True),
        ("AVX512", {"ONEDNN_MAX_CPU_ISA": "avx2"}, False),
        ("AVX512", {"DNNL_MAX_CPU_ISA": "SSE41"}, False),
        ("AVX2", {}, False),
        ("DEFAULT", {"ONEDNN_MAX_CPU_ISA": "ALL"}, False),
    ],
)
def test_onednn_uses_avx512_where_cpu_and_environment_allow_it(
    monkeypatch: pytest.MonkeyPatch, capability: str, variables: dict[str, str], uses: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert operations.onednn_uses_avx512() is uses


def test_a_dispatch_mode_sees_every_operation_of_its_block() -> None:
    seen = []

    class Follower(operations.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            seen.append((func.overloadpacket, operations.tree_leaves((args, result))[-1]))
            return result

    x = torch.ones(3)
    with Follower():
        y = x + 1
    y.mul_(2)
    ((operation, result),) = seen
    assert operation is torch.ops.aten.add
    assert result is y


def test_tree_leaves_are_those_of_nested_containers() -> None:
    assert operations.tree_leaves(([1, (2, {"a": 3})], {"b": [4]}, None)) == [1, 2, 3, 4, None]


def test_argument_names_are_those_of_the_operation() -> None:
    assert operations.argument_names("aten::mm") == ["self", "mat2"]
    assert operations.argument_names("aten::no_such_operation") is None
