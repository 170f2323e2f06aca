"""Compare two ways to run megatron-core without CUDA: rewrite its sources at import, or intercept torch's calls.

Both train a small model with our training step. They exclude each other, so each measurement runs in a separate
process, and this file must not import megatron-core.
"""

import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import perf_counter, thread_time
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from benchmarks.configs import run_config
from benchmarks.own_process import Functions, own_process
from benchmarks.timing import Row, check_repeats, percentile
from megatron_step.config.model import ModelConfig
from megatron_step.engine import cpu, cuda_on_cpu

HOOK = "import hook"
SHIM = "torch function mode"
MODEL = ModelConfig(
    num_layers=4, hidden_size=64, ffn_hidden_size=176, num_attention_heads=4, seq_length=32, vocab_size=512
)
"""A model so small that calls of torch, not arithmetic, take the time of a step."""
_MICRO_BATCH_SIZE = 2
_WARMUP = 3
_MEASURE = "measure"


def run(repeats: int, model: ModelConfig = MODEL, steps: int = 50) -> list[Row]:
    """Return a row for each way: processor time of a step over `repeats` processes of `steps` steps, and start time.

    Raises RuntimeError on a machine with a CUDA device, if a process fails, or if the losses of the two ways differ.
    """
    if torch.cuda.is_available():
        raise RuntimeError(
            "the engine benchmark needs a machine without a CUDA device: hide it (CUDA_VISIBLE_DEVICES=)"
        )
    check_repeats(repeats)
    measured: dict[str, list[Any]] = {HOOK: [], SHIM: []}
    for _ in range(repeats):
        for way, results in measured.items():
            results.append(_in_process(way, model, steps))
    if len({loss for results in measured.values() for _, _, loss in results}) > 1:
        raise RuntimeError("the two ways give different losses: one of them computes another model")
    return [_row(way, measured) for way in measured]


def _row(way: str, measured: dict[str, list[Any]]) -> Row:
    def milliseconds(way: str) -> list[float]:
        return [1e3 * value for seconds, _, _ in measured[way] for value in seconds]

    values = milliseconds(way)
    return {
        "benchmark": "megatron-core without CUDA: cost of a step",
        "way": way,
        "milliseconds": statistics.median(values),
        "p10": percentile(values, 0.1),
        "p90": percentile(values, 0.9),
        "of_the_hook": statistics.median(values) / statistics.median(milliseconds(HOOK)),
        "start_seconds": statistics.median(start for _, start, _ in measured[way]),
    }


def _in_process(way: str, model: ModelConfig, steps: int) -> tuple[list[float], float, float]:
    with own_process(partial(_process, way, model, steps)) as call:
        return call(_MEASURE)


@contextmanager
def _process(way: str, model: ModelConfig, steps: int) -> Iterator[Functions]:
    torch.set_num_threads(1)  # the ways differ in Python code, which runs on one thread
    warnings.simplefilter("ignore")  # megatron-core warns about missing packages; only the hook suppresses that
    if way == SHIM:
        install_shim()
    yield {_MEASURE: partial(_measure, model, steps)}


def _measure(model: ModelConfig, steps: int) -> tuple[list[float], float, float]:
    """Return processor seconds of each step, seconds of imports and model building, and the last loss."""
    start = perf_counter()
    with _training(model) as step:
        start_seconds = perf_counter() - start
        seconds = []
        for _ in range(_WARMUP + steps):
            begin = thread_time()
            loss = step()
            seconds.append(thread_time() - begin)
    return seconds[_WARMUP:], start_seconds, loss


@contextmanager
def _training(model: ModelConfig) -> Iterator[Callable[[], float]]:
    from benchmarks.train_arms import megatron_step_arm, random_batch
    from megatron_step.engine.parallel import parallel_layout, stop_world
    from megatron_step.training.state import initial_state

    config = run_config(model, _MICRO_BATCH_SIZE, "fp32")
    assert model.vocab_size is not None
    with parallel_layout(config.parallel, config.training.seed) as parallel:
        state = initial_state(config, model.vocab_size, parallel)
        yield megatron_step_arm(state, random_batch(model, _MICRO_BATCH_SIZE), config, parallel)
    stop_world()


def install_shim() -> None:
    """Remove the import hook, and make torch itself replace CUDA with the CPU for the rest of the process."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != cpu.__name__]
    for name, value in vars(cuda_on_cpu).items():
        if getattr(value, "__module__", None) == cuda_on_cpu.__name__ and not name.startswith("__"):
            setattr(torch.cuda, name, value)
    kinds: tuple[Any, ...] = (torch.Tensor, torch.nn.Module)
    for kind in kinds:
        kind.cuda = lambda self, *args, **kwargs: self
    _CudaMeansCpu().__enter__()


class _CudaMeansCpu(TorchFunctionMode):
    """Mode that rewrites device="cuda" in every call of torch, and gives CPU tensors CUDA's type names."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result
