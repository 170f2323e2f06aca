"""Compare every operation with torch's, forward and backward, at the sizes of one layer of a small Llama."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Row, interleave, spread
from megatron_step import ops

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model and of the batch; ModelConfig explains the fields."""

    seq_length: int = 512
    micro_batch_size: int = 4
    hidden_size: int = 512
    ffn_hidden_size: int = 1376
    num_attention_heads: int = 8
    vocab_size: int = 8192

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Case:
    """An operation: our implementation and torch's, with the same inputs."""

    name: str
    """The operation's name."""
    ours: Callable[..., Outputs]
    """Our implementation."""
    torch: Callable[..., Outputs]
    """The implementation in plain torch."""
    inputs: tuple[Tensor, ...]
    """The inputs of both."""


def run(repeats: int, sizes: Sizes | None = None) -> list[Row]:
    """Return a row per operation, precision, direction and arm: median, 10th and 90th percentile in milliseconds."""
    sizes = Sizes() if sizes is None else sizes
    rows = []
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for case in cases(sizes, dtype):
            for direction, arms in (("forward", _forward_arms(case)), ("forward and backward", _training_arms(case))):
                seconds = interleave(arms, repeats)
                rows += [
                    {
                        "benchmark": f"operations, {direction}",
                        "operation": case.name,
                        "precision": precision,
                        "arm": arm,
                        **spread([1e3 * value for value in values], "milliseconds"),
                        "speedup": _median(seconds["torch"]) / _median(values),
                    }
                    for arm, values in seconds.items()
                ]
    return rows


def cases(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """Return the operations with inputs; the implementations in torch are those of a Llama in plain torch."""
    s, b, h, f, n, d = (
        sizes.seq_length,
        sizes.micro_batch_size,
        sizes.hidden_size,
        sizes.ffn_hidden_size,
        sizes.num_attention_heads,
        sizes.head_size,
    )
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    angles = torch.arange(s)[:, None] * torch.logspace(0, -4, d // 2).repeat(2)
    cos, sin = angles.cos(), angles.sin()
    labels = torch.randint(sizes.vocab_size, (s, b), generator=generator)
    heads = {"num_attention_heads": n, "num_query_groups": n}
    return [
        Case("rms_norm", lambda x, w: (ops.rms_norm(x, w, 1e-5),), _torch_rms_norm, (normal(s, b, h), normal(h))),
        Case("swiglu", lambda x: (ops.swiglu(x),), _torch_swiglu, (normal(s, b, 2 * f),)),
        Case(
            "split_qkv_rotary",
            lambda qkv: ops.split_qkv_rotary(qkv, cos, sin, **heads),
            functools.partial(_torch_split_qkv_rotary, cos=cos.to(dtype), sin=sin.to(dtype), heads=n),
            (normal(s, b, 3 * h),),
        ),
        Case(
            "attention",
            lambda q, k, v: (ops.attention(q, k, v),),
            _torch_attention,
            (normal(s, b, n, d), normal(s, b, n, d), normal(s, b, n, d)),
        ),
        Case(
            "linear",
            lambda x, w: (ops.linear(x, w),),
            lambda x, w: (F.linear(x, w),),
            (normal(s, b, h), normal(2 * f, h, scale=0.02)),
        ),
        Case(
            "linear_cross_entropy",
            lambda x, w: (ops.linear_cross_entropy(x, w, labels),),
            functools.partial(_torch_linear_cross_entropy, labels=labels),
            (normal(s, b, h), normal(sizes.vocab_size, h, scale=0.02)),
        ),
    ]


def _forward_arms(case: Case) -> dict[str, Callable[[], object]]:
    @torch.no_grad()
    def forward(operation: Callable[..., Outputs]) -> None:
        operation(*case.inputs)

    return {"torch": lambda: forward(case.torch), "megatron_step": lambda: forward(case.ours)}


def _training_arms(case: Case) -> dict[str, Callable[[], object]]:
    leaves = [tensor.detach().requires_grad_() for tensor in case.inputs]
    upstream = [torch.ones_like(output) for output in case.torch(*leaves)]

    def train(operation: Callable[..., Outputs]) -> None:
        outputs = operation(*leaves)
        torch.autograd.grad(outputs, leaves, [gradient.to(y.dtype) for y, gradient in zip(outputs, upstream)])

    return {"torch": lambda: train(case.torch), "megatron_step": lambda: train(case.ours)}


def _torch_rms_norm(x: Tensor, weight: Tensor) -> Outputs:
    return (F.rms_norm(x, weight.shape, weight, 1e-5),)


def _torch_swiglu(x: Tensor) -> Outputs:
    gate, up = x.chunk(2, dim=-1)
    return (F.silu(gate) * up,)


def _torch_split_qkv_rotary(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Outputs:
    """Split qkv [s, b, 3h], n groups of a query, a key and a value, into rotated q and k and into v, [s, b, n, d]."""
    q, k, v = qkv.unflatten(2, (heads, 3, -1)).unbind(3)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None, None] + torch.cat((-second, first), dim=-1) * sin[:, None, None]

    return rotate(q), rotate(k), v


def _torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    """Attend: q, k and v [s, b, n, d] -> [s, b, n * d]."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    return (F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3).flatten(2),)


def _torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
    logits = F.linear(hidden, weight).float().flatten(0, 1)
    return (F.cross_entropy(logits, labels.flatten(), reduction="none").view(labels.shape),)


def _median(values: list[float]) -> float:
    return spread(values, "median")["median"]
