"""Bytes that each pipeline rank needs in a stage, by kind.

With the elements F of the frozen weights and T of the trained ones, adapters among them, on a rank of d data-parallel
ones, the model states take

    w F  +  w T'  +  g T'  +  o T / d        bytes,  d = 1 without the distributed optimizer

with w, g and o of the recipe (plan/states.py). T' is T with the padding that megatron-core puts between weights
for the distributed optimizer (megatron_core/distributed/param_and_grad_buffer.py, 0.16.1):

    a weight begins at a multiple of 64 elements; a bucket ends at a multiple of lcm(d, 128) elements

Rank k of d owns the k-th part of d equal ones of each bucket, and has optimizer states for the weights in it. Without
the distributed optimizer nothing is padded and d = 1.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

from megatron_step.plan.names import is_adapter, is_embedding, layer_of
from megatron_step.plan.resolved import ResolvedConfig
from megatron_step.plan.stages import Stage
from megatron_step.plan.states import Parameter, Recipe, copied_in_growth
from megatron_step.planner.costs.activations import activation_bytes
from megatron_step.planner.costs.held import WEIGHT_ALIGNMENT, HeldChunk, held_chunks
from megatron_step.planner.costs.update import update_bytes


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a pipeline rank's fullest process, over its tensor- and data-parallel ranks."""

    frozen_weight_bytes: int
    """Weights without gradients."""
    trained_weight_bytes: int
    """Trained weights without the adapters' weights, with the padding of their buffer."""
    adapter_weight_bytes: int
    """Weights of the adapters."""
    gradient_bytes: int
    """Gradient buffers."""
    optimizer_bytes: int
    """Optimizer states."""
    activation_bytes: int
    """The most that a training step needs beside them: activations, or the update of the weights by Muon."""

    @property
    def model_state_bytes(self) -> int:
        """Weights, gradients and optimizer states."""
        weights = self.frozen_weight_bytes + self.trained_weight_bytes + self.adapter_weight_bytes
        return weights + self.gradient_bytes + self.optimizer_bytes

    @property
    def peak_bytes(self) -> int:
        """Most bytes in use at once during a training step."""
        return self.model_state_bytes + self.activation_bytes


def stage_memory(resolved: ResolvedConfig, stage: Stage, turn: int = 0) -> tuple[RankMemory, ...]:
    """Return the memory of each pipeline rank in `stage` after `turn` changes of old layers; nothing in no steps."""
    return tuple(rank_memory(resolved, stage, chunks) for chunks in held_chunks(resolved, stage, turn))


def rank_memory(resolved: ResolvedConfig, stage: Stage, chunks: Sequence[HeldChunk]) -> RankMemory:
    """Return the memory of the pipeline rank that holds `chunks` in `stage`; nothing in a stage of no steps."""
    if stage.num_steps == 0:
        return RankMemory(0, 0, 0, 0, 0, 0)
    recipe = resolved.recipe
    frozen_bytes = padded = adapters = 0  # the last two in elements
    owned = [0] * resolved.dp_size  # bytes of optimizer states on each data-parallel rank
    for held in chunks:
        frozen_bytes += sum(recipe.frozen_bytes(p) for p in held.parameters if not p.treatment.trained)
        adapters += sum(p.numel for p in held.parameters if is_adapter(p.key))
        buckets = _buckets(resolved, held)
        padded += buckets[-1].stop if buckets else 0
        for bucket in buckets:
            _add_owned(owned, bucket, recipe, resolved.config.parallel.distributed_optimizer)
    return RankMemory(
        frozen_weight_bytes=frozen_bytes,
        trained_weight_bytes=recipe.weight.bytes(padded - adapters),
        adapter_weight_bytes=recipe.weight.bytes(adapters),
        gradient_bytes=recipe.gradient.bytes(padded),
        optimizer_bytes=max(owned),
        activation_bytes=max(activation_bytes(resolved, chunks), update_bytes(resolved, chunks)),
    )


def growth_bytes(parameters: Sequence[Parameter], stage: Stage) -> int:
    """The most that a rank needs beside its model states while the model grows into `stage`; 0 for the first stage.

    A layer at a time is read from the checkpoint, and a tensor at a time of what is outside the layers.
    """
    if stage.index == 0:
        return 0
    layers: dict[int, int] = defaultdict(int)
    for parameter in parameters:
        layers[layer_of(parameter.key)] += parameter.numel
    layers.pop(-1, None)  # outside the layers
    largest = max((parameter.numel for parameter in parameters), default=0)
    return copied_in_growth(max(layers.values(), default=0), largest)


@dataclass(frozen=True)
class HostMemory:
    """Host memory beside the model states, on the fullest rank of a pipeline rank."""

    save_bytes: int
    """Bytes of a save. A synchronous save copies a device's largest tensor to the host; on the CPU it needs nothing.
    An asynchronous save holds all bytes that the rank writes: copies from a device, or pages that training changes."""
    load_bytes: int
    """Bytes of a load from any layout: two whole tensors of the largest size, the one being read and the last one."""
    resting_bytes: int = 0
    """Optimizer states of old layers that wait for their turn."""


def host_memory(resolved: ResolvedConfig, parameters: Sequence[Parameter]) -> HostMemory:
    """Return the host memory of a pipeline rank that holds `parameters`."""
    config, recipe = resolved.config, resolved.recipe
    largest = max(map(recipe.largest_tensor_bytes, parameters), default=0)
    owners = resolved.dp_size if config.parallel.distributed_optimizer else 1
    written = recipe.saved_bytes(parameters, owners)
    return HostMemory(
        save_bytes=written if config.checkpoint.asynchronous else largest,
        load_bytes=2 * largest * config.parallel.tensor_parallel_size,
        resting_bytes=recipe.resting_bytes(parameters, resolved.dp_size),
    )


def stage_host_memory(resolved: ResolvedConfig, stage: Stage, turn: int = 0) -> tuple[HostMemory, ...]:
    """Return the host memory of each pipeline rank in `stage` after `turn` changes of old layers."""
    ranks = ([one for chunk in chunks for one in chunk.parameters] for chunks in held_chunks(resolved, stage, turn))
    return tuple(host_memory(resolved, parameters) for parameters in ranks)


@dataclass(frozen=True)
class _Bucket:
    """A part of a chunk's gradient buffer that is reduced at once, in elements from the buffer's start."""

    start: int
    stop: int
    weights: tuple[tuple[int, Parameter], ...]
    """Each weight in it, and where it starts."""


def _buckets(resolved: ResolvedConfig, held: HeldChunk) -> list[_Bucket]:
    """Return the buckets of a chunk's trained weights, as _ParamAndGradBuffer.__init__ makes them."""
    distributed = resolved.config.parallel.distributed_optimizer
    align, align_end = (WEIGHT_ALIGNMENT, lcm(resolved.dp_size, 128)) if distributed else (1, 1)
    limit = _bucket_elements(resolved, held)
    trained = [parameter for parameter in held.parameters if parameter.treatment.trained]
    buckets: list[_Bucket] = []
    start = end = 0
    weights: list[tuple[int, Parameter]] = []

    def close() -> None:
        nonlocal start, end, weights
        buckets.append(_Bucket(start, _round_up(end, align_end), tuple(weights)))
        start = end = buckets[-1].stop
        weights = []

    for parameter in reversed(trained):  # about the order in which the backward pass reaches them
        # An embedding that two pipeline ranks share is alone in its bucket, so that both split it in the same way.
        alone = distributed and _is_shared_embedding(parameter, resolved)
        end = _round_up(end, align)
        if alone and weights:
            close()
        weights.append((end, parameter))
        end += parameter.numel
        if alone or (limit is not None and end - start >= limit):
            close()
    if weights:
        close()
    return buckets


def _is_shared_embedding(parameter: Parameter, resolved: ResolvedConfig) -> bool:
    shared = resolved.blocks.head.tied and resolved.config.parallel.pipeline_parallel_size > 1
    return shared and is_embedding(parameter.key)


def _bucket_elements(resolved: ResolvedConfig, held: HeldChunk) -> int | None:
    """Return the elements after which a bucket is full; None for one bucket (DistributedDataParallel.__init__)."""
    overlapped = resolved.config.parallel.overlap_grad_reduce and resolved.dp_size > 1
    return max(40_000_000, 1_000_000 * resolved.dp_size) if overlapped and held.chunk.is_first else None


def _add_owned(owned: list[int], bucket: _Bucket, recipe: Recipe, distributed: bool) -> None:
    """Add to `owned` the optimizer states that each data-parallel rank has for a bucket's weights."""
    if not distributed:
        for rank in range(len(owned)):
            owned[rank] += sum(recipe.optimizer_bytes(weight.key, weight.shape) for _, weight in bucket.weights)
        return
    part = (bucket.stop - bucket.start) // len(owned)
    for start, weight in bucket.weights:
        first, last = start - bucket.start, start - bucket.start + weight.numel - 1
        for rank in range(first // part, last // part + 1):
            own = max(rank * part - first, 0), min((rank + 1) * part - first, weight.numel)
            owned[rank] += recipe.optimizer_bytes(weight.key, weight.shape, *own)


def _round_up(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple
