"""Cost of an adapter on a frozen linear: time of forward and backward, and bytes kept for backward."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, process_time

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Row, interleave, spread
from megatron_step import ops
from megatron_step.engine.device import current_device

Linear = Callable[[Tensor], Tensor]
DROPOUT = 0.1
_FROZEN = "frozen linear"


@dataclass(frozen=True)
class Setting:
    """A device and sizes, each measured in fp32 and bf16."""

    device: torch.device
    """The device."""
    tokens: int
    """Rows of the linear's input."""
    hidden_sizes: tuple[int, ...]
    """Widths of the linear's input and output."""
    ranks: tuple[int, ...]
    """Ranks of the adapter."""


CPU = Setting(torch.device("cpu"), 2048, (1024, 2048), (8, 32, 128))
GPU = Setting(torch.device("cuda"), 8192, (2048, 4096), (16, 64))


def run(repeats: int, setting: Setting | None = None) -> list[Row]:
    """Return rows for each precision, width, rank and arm: time relative to the frozen linear in the same turn.

    On the CPU this is processor time of one thread, which other processes disturb least. `floor` is the cost by
    operation counts alone, 1 + 3 r / h. `kept_mib` is the memory that forward keeps, without weights.
    """
    if setting is None:
        setting = CPU if current_device().type == "cpu" else GPU
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [
            row
            for dtype in (torch.float32, torch.bfloat16)
            for hidden_size in setting.hidden_sizes
            for rank in setting.ranks
            for row in _case_rows(repeats, setting.device, setting.tokens, hidden_size, rank, dtype)
        ]
    finally:
        torch.set_num_threads(threads)


def _case_rows(
    repeats: int, device: torch.device, tokens: int, hidden_size: int, rank: int, dtype: torch.dtype
) -> list[Row]:
    torch.manual_seed(1)
    x = torch.randn(tokens, hidden_size, device=device).to(dtype).requires_grad_()
    dy = torch.randn(tokens, hidden_size, device=device).to(dtype)
    linears = _linears(hidden_size, rank, dtype, device)
    clock = process_time if device.type == "cpu" else _gpu_time
    seconds = interleave({name: _training(linear, x, dy) for name, linear in linears.items()}, repeats, clock=clock)
    return [
        {
            "benchmark": f"linear with an adapter, forward and backward, {tokens} tokens, {device.type}",
            "precision": "fp32" if dtype == torch.float32 else "bf16",
            "hidden": hidden_size,
            "rank": rank,
            "arm": name,
            **spread([own / frozen for own, frozen in zip(seconds[name], seconds[_FROZEN])], "over_frozen"),
            "floor": 1.0 if name == _FROZEN else 1 + 3 * rank / hidden_size,
            "milliseconds": spread([1e3 * value for value in seconds[name]], "median")["median"],
            "kept_mib": kept_bytes(linear, x) / 2**20,
        }
        for name, linear in linears.items()
    ]


def _gpu_time() -> float:
    torch.cuda.synchronize()
    return perf_counter()


def _training(linear: Linear, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Return a function that runs forward and backward, with gradients of the input and of trained weights."""

    def train() -> None:
        linear(x).backward(dy)
        x.grad = None

    return train


def _linears(hidden_size: int, rank: int, dtype: torch.dtype, device: torch.device) -> dict[str, Linear]:
    """Return the frozen linear, and implementations of an adapter on it; alpha is twice the rank."""

    def random(rows: int, columns: int, scale: float) -> Tensor:
        return (torch.randn(rows, columns, device=device) * scale).to(dtype)

    weight = random(hidden_size, hidden_size, hidden_size**-0.5)
    a = random(rank, hidden_size, hidden_size**-0.5).requires_grad_()
    b = random(hidden_size, rank, 1.0).requires_grad_()
    mask = ops.AdapterDropout(DROPOUT, seed=1, first_column=0, num_columns=hidden_size)
    linears: dict[str, Linear] = {
        _FROZEN: lambda x: ops.linear(x, weight),
        "megatron_step": lambda x: ops.adapter_linear(x, weight, a, b, 2.0),
        "megatron_step, dropout": lambda x: ops.adapter_linear(x, weight, a, b, 2.0, mask),
        "plain torch": lambda x: _plain(x, weight, a, b, 0.0),
        "plain torch, dropout": lambda x: _plain(x, weight, a, b, DROPOUT),
    }
    if importlib.util.find_spec("peft") is not None:
        linears |= {"peft": _peft(weight, rank, 0.0), "peft, dropout": _peft(weight, rank, DROPOUT)}
    return linears


def _plain(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, dropout: float) -> Tensor:
    """Compute the adapted linear as most implementations do."""
    return F.linear(x, weight) + 2.0 * F.linear(F.linear(F.dropout(x, dropout) if dropout else x, a), b)


def _peft(weight: Tensor, rank: int, dropout: float) -> Linear:
    """Return peft's adapter on a frozen linear."""
    import peft

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(linear), config, autocast_adapter_dtype=False)
    return model.train()


def kept_bytes(linear: Linear, x: Tensor) -> int:
    """Bytes that forward keeps for backward, without weights; shared memory counts once."""
    (y, kept), (_, kept_again) = _forward(linear, x), _forward(linear, x)
    del y  # kept alive until here, so that the second forward cannot reuse its memory
    # Memory that both forwards kept existed before them: weights and x.
    own = {pointer: size for pointer, size in kept.items() if pointer not in kept_again}
    x_pointer = x.untyped_storage().data_ptr()
    return sum(own.values()) + kept.get(x_pointer, 0)


def _forward(linear: Linear, x: Tensor) -> tuple[Tensor, dict[int, int]]:
    """Return the output, and the address and bytes of each block of memory kept for backward."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return linear(x), kept
