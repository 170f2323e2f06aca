"""The summary of a stage in the log: trained and frozen weights, planned and measured memory."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch

from megatron_step import ops
from megatron_step.config.counts import counted
from megatron_step.config.optimization import Rule
from megatron_step.config.run import RunConfig
from megatron_step.config.stages import GrowthConfig
from megatron_step.engine.device import current_device
from megatron_step.engine.parallel import Parallel
from megatron_step.model.build import Sharded, sharded_weights
from megatron_step.plan.matrices import rule_of
from megatron_step.plan.names import in_layer, layer_key, layer_of
from megatron_step.plan.operators import operator_of
from megatron_step.plan.stages import StagePlan
from megatron_step.plan.states import recipe_of
from megatron_step.training.state import TrainState

_NAMES = {"embedding": "embedding, output layer", "new_layer": "new layers", "adapter": "adapters"}
_MIB = 2**20


def stage_summary(state: TrainState, plan: StagePlan, config: RunConfig, parallel: Parallel) -> str:
    """Return the stage's layers and steps, and a table of trained and frozen weights. Every rank must call it."""
    stage, recipe = state.stage, recipe_of(config)
    names = {**_NAMES, "base": "old layers, norms" if stage.index > 0 else "layers, norms"}
    groups: dict[tuple[str, str], list[tuple[str, tuple[int, ...]]]] = defaultdict(list)
    model = _whole_model(state, parallel)
    for key, (shape, status, role) in model.items():
        groups[status, names[role]].append((key, shape))
    lines = [
        f"stage {stage.number} of {len(plan.stages)}: {counted(stage.num_layers, 'layer')}, {stage.num_new_layers} of "
        f"them new, pipeline layout {list(stage.layout)}; steps {state.step + 1} to {stage.last_step}",
        f"  operations on {current_device()}: {ops.backend(current_device())}",
        *([_growth(config.growth)] if stage.index > 0 and state.growth_peak_bytes is not None else []),
        f"  {'':8}{'':24}{'parameters':>16}{'weights':>14}{'gradients':>14}{'optimizer':>14}",
    ]
    for (status, name), members in sorted(groups.items(), reverse=True):
        trained, elements = status == "trained", sum(prod(shape) for _, shape in members)
        weights, gradients = recipe.weight.bytes(elements), trained * recipe.gradient.bytes(elements)
        has_states = trained or status == "resting"  # on the host
        sizes = (weights, gradients, has_states * sum(recipe.optimizer_bytes(*one) for one in members))
        lines.append(f"  {status:8}{name:24}{elements:>16,}" + "".join(f"{size / _MIB:>10,.1f} MiB" for size in sizes))
    return "\n".join(
        [*lines, *_rules({key: shape for key, (shape, status, _) in model.items() if status == "trained"}, config)]
    )


def _rules(trained: Mapping[str, tuple[int, ...]], config: RunConfig) -> Iterator[str]:
    """Yield a line for each rule: how many weights it trains, and their names, those of layers without the number."""
    weights: dict[Rule, list[str]] = defaultdict(list)
    for key, shape in trained.items():
        name = key if layer_of(key) < 0 else in_layer(key, 0).removeprefix(layer_key(0, ""))
        weights[rule_of(key, shape, config.optimizer.rule)].append(name.removesuffix(".weight"))
    for rule, names in sorted(weights.items(), reverse=True):
        shown = {"adamw": "AdamW", "muon": "Muon (q, k and v apart, gate and up apart)"}[rule]
        yield f"  {shown} trains {counted(len(names), 'weight')}: {', '.join(sorted(set(names)))}"


def _growth(growth: GrowthConfig) -> str:
    """Return a line that says how the model was grown."""
    operator = operator_of(growth)
    keeps = "keeps" if operator.preserves_function(growth) else "does not keep"
    return f"  grown by {operator.describe(growth)}, which {keeps} the model's function"


def _whole_model(state: TrainState, parallel: Parallel) -> dict[str, tuple[tuple[int, ...], str, str]]:
    """Shape, whether it is trained, resting or frozen, and role of every weight, by its key, from all ranks."""
    own = {
        shard.key: (_whole_shape(shard), _status(shard.data), shard.data.role)
        for shard in sharded_weights(state.chunks, parallel).values()
    }
    ranks: list[Any] = [None] * parallel.world_size
    torch.distributed.all_gather_object(ranks, own)
    return {key: entry for rank in ranks for key, entry in rank.items()}


def _status(weight: torch.Tensor) -> str:
    """Whether a weight is trained, is frozen for good, or rests, with optimizer states on the host."""
    if weight.requires_grad:
        return "trained"
    return "resting" if getattr(weight, "rests", False) else "frozen"


def _whole_shape(shard: Sharded) -> tuple[int, ...]:
    whole = shard if hasattr(shard, "global_shape") else shard.build()[0]
    return tuple(whole.global_shape)


def memory_summary(ranks: Sequence[dict[str, Any]]) -> str:
    """Return a table of the planned and measured memory of each rank."""
    kinds = list(ranks[0]["planned"])
    titles = [name.removesuffix("_bytes").replace("_", " ") for name in kinds]
    lines = ["  memory in MiB, planned / measured"]
    lines.append(f"  {'rank':6}" + "".join(f"{title:>20}" for title in titles))
    for number, rank in enumerate(ranks):
        cells = [f"{rank['planned'][kind] / _MIB:,.1f} / {rank['measured'][kind] / _MIB:,.1f}" for kind in kinds]
        lines.append(f"  {number:<6}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)
