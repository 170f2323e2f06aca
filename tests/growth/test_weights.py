"""A grown model has, in every layout, the weights that follow from the whole tensors of the checkpoint it grew from."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from zlib import crc32

import pytest
import torch
from long_suite import cases
from small_run import PLAIN, TIED, VOCAB_SIZE, made_up_batch, manifest_facts, read_checkpoint, small_config, spread
from small_run import whole_tensors as whole
from torch import Tensor
from worlds import Worlds

from megatron_step.checkpoint.load import find_checkpoint, load_weights
from megatron_step.checkpoint.save import CheckpointSaver
from megatron_step.config.parallel import ParallelConfig
from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import parallel_layout
from megatron_step.growth import weights
from megatron_step.growth.weights import load_merged
from megatron_step.model.build import build_model
from megatron_step.plan.resolved import resolve
from megatron_step.plan.stages import Stage
from megatron_step.plan.states import training_recipe
from megatron_step.planner.plan import make_plan
from megatron_step.training.entry import first_state
from megatron_step.training.state import build_stage_model, build_state, make_trainable
from megatron_step.training.step import evaluate_batch, train_step

Tensors = dict[str, Tensor]
Layers = Sequence[tuple[tuple[int, ...], bool]]
"""The source layers of each layer in the larger model, and whether the layer is new."""

MODELS: dict[str, dict[str, Any]] = {"gated": PLAIN, "tied": TIED, "plain": {**PLAIN, "mlp": "gelu"}}

TP2 = {"tensor_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_size": 2}
BF16 = {"precision": "bf16"}

# Five layers, then six, then seven.
STAGES: dict[str, Any] = {"count": 3, "layers": [5, 1, 1]}
UNEVEN = {**STAGES, "layouts": [[4, 1], [1, 5], [5, 2]]}
PAIR: dict[str, Any] = {"count": 2, "layers": [5, 2]}
REPEATED: dict[str, Any] = {"count": 3, "layers": [2, 2, 4]}

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {"distributed_optimizer": False}, STAGES),
    "TP2 SP": (2, SP, STAGES),
    "PP2 uneven": (2, PP2, UNEVEN),
    "PP2 VPP2": (2, VPP2, STAGES),
    "DP2": (2, {"distributed_optimizer": False}, STAGES),
    "DP2 distributed": (2, {}, STAGES),
    "TP2 PP2": (4, {**TP2, **PP2}, STAGES),
    "PP4": (4, {"pipeline_parallel_size": 4}, STAGES),
}

# By architecture: the layout that wrote the checkpoint of a grown stage, those that `make test` grows it in, the ways.
SAVED_BY = {"gated": "TP2 PP2", "tied": "PP2 VPP2", "plain": "one"}
GROWN_IN = {
    "gated": ["one", "PP2 VPP2", "DP2 distributed", "TP2 PP2"],
    "tied": ["TP2 SP", "PP2 uneven"],
    "plain": ["TP2 SP", "PP4"],
}
WAYS = {"gated": [("mean", "merge"), ("copy", "keep")], "tied": [("mean", "keep")], "plain": [("random", "merge")]}


def config_of(model: str, layout: str, **sections: Any) -> RunConfig:
    _, parallel, stages = LAYOUTS[layout]
    stages = sections.pop("stages", stages)
    model_section = {**MODELS[model], "num_layers": sum(stages["layers"])}
    return small_config(model=model_section, parallel=parallel, stages=stages, steps=4, **sections)


class Saved:
    """Checkpoints of a stage's end, and initial weights; each is made when it is first asked for."""

    def __init__(self, worlds: Worlds, folder: Path) -> None:
        self.worlds, self._folder = worlds, folder
        self._made: dict[str, Any] = {}

    def folder(self, config: RunConfig, layout: str, stage_index: int) -> Path:
        name = f"{stage_index}_{crc32(repr(config).encode())}"
        if name not in self._made:
            world = self.worlds(LAYOUTS[layout][0])
            world.run(write_stage, config=config, folder=self._folder / name, stage_index=stage_index)
            self._made[name] = self._folder / name
        return self._made[name]

    def fresh(self, config: RunConfig, stage_index: int) -> Tensors:
        config = replace(config, parallel=ParallelConfig(), stages=replace(config.stages, layouts="even"))
        place = (config.growth.operator, config.growth.position)
        name = f"fresh_{stage_index}_{config.model}_{config.stages.layers}_{place}_{config.training.precision}"
        if name not in self._made:
            (self._made[name],) = self.worlds(1).run(initial_weights, config=config, stage_index=stage_index)
        return self._made[name]


@pytest.fixture(scope="module")
def saved(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(worlds, tmp_path_factory.mktemp("saved"))


# The oracle.

OUTPUT_PROJECTIONS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


def interpolated(num_layers: int, above: Sequence[int], init: str) -> Layers:
    """Layers where a new one comes above each of the old ones `above`."""
    layers: list[tuple[tuple[int, ...], bool]] = []
    for old in range(num_layers):
        layers.append(((old,), False))
        sources = {"mean": (old, old + 1), "random": ()}.get(init, (old,))
        layers += [(sources, True)] * list(above).count(old)
    return layers


def expected_weight(key: str, checkpoint: Tensors, fresh: Tensors, layers: Layers, config: RunConfig) -> Tensor:
    """A weight of the larger model in fp64, from the checkpoint's and from those that it would have without one."""
    if not key.startswith("decoder.layers."):
        return checkpoint[key].double()
    _, _, number, name = key.split(".", 3)
    sources, is_new = layers[int(number)]
    if ".adapter." in key:
        before = checkpoint.get(f"decoder.layers.{sources[0]}.{name}")
        keeps = config.adapter.at_stage_end == "keep" and before is not None
        return (before if keeps else fresh[key]).double()
    if is_new and config.growth.init == "random":
        return fresh[key].double()
    if is_new and config.growth.init == "identity" and name in OUTPUT_PROJECTIONS:
        return torch.zeros_like(fresh[key], dtype=torch.float64)
    merges = is_new or config.adapter.at_stage_end == "merge"
    return torch.stack([source_weight(checkpoint, layer, name, merges) for layer in sources]).mean(0)


def source_weight(checkpoint: Tensors, layer: int, name: str, merges: bool) -> Tensor:
    """W or W + alpha / rank B A of a layer of the checkpoint, in fp64."""
    weight = checkpoint[f"decoder.layers.{layer}.{name}"].double()
    adapter = f"decoder.layers.{layer}.{name.removesuffix('.weight')}.adapter"
    if merges and name.endswith(".weight") and f"{adapter}.linear_in.weight" in checkpoint:
        a, b = (checkpoint[f"{adapter}.{factor}.weight"].double() for factor in ("linear_in", "linear_out"))
        return weight + 8 / 4 * b @ a  # small_config's alpha and rank
    return weight


def gaps_used(config: RunConfig) -> list[int]:
    """Layers of the first stage above which the second one's new layers come, as planned."""
    layers = make_plan(resolve(config, VOCAB_SIZE)).stages[1].layers
    return sorted(layer.sources[0] for layer in layers if layer.born == 1)


def newest(folder: Path) -> Path:
    """The one checkpoint in a folder."""
    (path,) = folder.iterdir()
    return path


def wrong_weights(grown: Tensors, expected: Tensors, precision: str = "fp32") -> list[str]:
    """Weights that are further from the expected ones than rounding explains, in words."""
    assert grown.keys() == expected.keys()
    found = []
    for key, weight in expected.items():
        # A few fp32 roundings, each 6e-8 of the value; with cancellation, of the largest that was added.
        allowed = 1e-6 * weight.abs().max()
        if precision == "bf16":  # a single rounding is off by half a step at most; bf16 has 8 digits
            allowed = allowed + torch.ldexp(torch.ones_like(weight), torch.frexp(weight).exponent - 9)
        error = (grown[key].double() - weight).abs()
        if not (error <= allowed).all():
            found.append(f"{key} is off by {float(error.max()):.1e}")
    return found


def check(
    saved: Saved, folder: Path, configs: list[RunConfig], layout: str, layers: Callable[[str], Layers], **options: Any
) -> None:
    """Grow a checkpoint of `saved` as each of `configs` says and compare; `layers` gives the larger model's by init."""
    checkpoint = read_checkpoint(newest(folder))
    results = saved.worlds(LAYOUTS[layout][0]).run(grow, configs=configs, folder=folder, **options)[0]
    for config, grown in zip(configs, results):
        fresh, of_init = saved.fresh(config, int(folder.name[0]) + 1), layers(config.growth.init)
        expected = {key: expected_weight(key, checkpoint, fresh, of_init, config) for key in fresh}
        wrong = wrong_weights(grown, expected, config.training.precision)
        assert wrong == [], f"{config.growth}: {wrong}"


# The tests.


@pytest.mark.parametrize(
    ("position", "above", "layout"),
    [
        ("upper", (2, 3), "PP2 VPP2"),
        ("intermediate", (1, 2), "TP2 SP"),
        ("lower", (0, 1), "DP2 distributed"),
        ("random", None, "DP2"),
    ],
)
def test_interpolated_layers_come_from_their_neighbours(
    saved: Saved, position: str, above: tuple[int, ...] | None, layout: str
) -> None:
    folder = saved.folder(config_of("gated", "one", stages=PAIR), "one", 0)
    growths = [{"position": position, "init": init} for init in ("mean", "copy", "identity", "random")]
    configs = [config_of("gated", layout, stages=PAIR, growth=growth) for growth in growths]
    gaps = gaps_used(configs[0]) if above is None else above
    check(saved, folder, configs, layout, lambda init: interpolated(5, gaps, init))


def test_random_positions_are_gaps_between_old_layers() -> None:
    used = set()
    for seed in range(20):
        config = config_of("gated", "one", stages=PAIR, growth={"position": "random"}, training={"seed": seed})
        layers = make_plan(resolve(config, VOCAB_SIZE)).stages[1].layers
        gaps = gaps_used(config)
        assert [(layer.sources, layer.born == 1) for layer in layers] == interpolated(5, gaps, "mean"), seed
        used.update(gaps)
    assert used == {0, 1, 2, 3}


@pytest.mark.parametrize("layout", ["one", "TP2 PP2"])
def test_stacked_layers_repeat_the_model(saved: Saved, layout: str) -> None:
    growths = [{"operator": "stack", "init": init} for init in ("copy", "identity", "random")]
    folder = saved.folder(config_of("gated", "one", stages=REPEATED, growth=growths[0]), "one", 1)
    configs = [config_of("gated", layout, stages=REPEATED, growth=growth) for growth in growths]
    check(saved, folder, configs, layout, lambda init: [((layer,), new) for new in (False, True) for layer in range(4)])


@pytest.mark.parametrize(
    ("model", "layout"),
    cases(product(MODELS, LAYOUTS), [(model, layout) for model, layouts in GROWN_IN.items() for layout in layouts]),
)
def test_layout_grows_the_weights_of_any_other(saved: Saved, model: str, layout: str) -> None:
    """Grow from six layers, all but the fifth with adapters, to seven; the new layer comes above the fifth."""
    folder = saved.folder(config_of(model, SAVED_BY[model]), SAVED_BY[model], 1)
    configs = [
        config_of(model, layout, growth={"init": init}, adapter={"at_stage_end": at_stage_end})
        for init, at_stage_end in WAYS[model]
    ]
    check(saved, folder, configs, layout, lambda init: interpolated(6, (4,), init))


@pytest.mark.parametrize("layout", ["TP2 PP2", "DP2 distributed"])
def test_bf16_weights_are_rounded_once(saved: Saved, layout: str) -> None:
    folder = saved.folder(config_of("gated", "TP2 SP", training=BF16), "TP2 SP", 1)
    configs = [
        config_of("gated", layout, training=BF16, growth={"init": init}, adapter={"at_stage_end": at_stage_end})
        for init, at_stage_end in (("mean", "merge"), ("random", "keep"))
    ]
    check(saved, folder, configs, layout, lambda init: interpolated(6, (4,), init))


@pytest.mark.parametrize(
    ("fault", "writer", "training"),
    [("place on the rank", "TP2 PP2", {}), ("scaling", "TP2 PP2", {}), ("rounded twice", "TP2 SP", BF16)],
)
def test_oracle_catches_planted_fault(saved: Saved, fault: str, writer: str, training: dict[str, Any]) -> None:
    folder = saved.folder(config_of("gated", writer, training=training), writer, 1)
    configs = [config_of("gated", "TP2 PP2", training=training)]
    with pytest.raises(AssertionError, match="mlp.linear_fc1.weight is off"):
        check(saved, folder, configs, "TP2 PP2", lambda init: interpolated(6, (4,), init), fault=fault)


def test_random_layers_begin_as_those_of_an_ungrown_model_of_the_new_depth(saved: Saved, worlds: Worlds) -> None:
    config = config_of("gated", "one", growth={"init": "random"})
    vanilla = config_of("gated", "one", stages={"count": 1, "layers": [7]})
    (ungrown,) = worlds(1).run(initial_weights, config=vanilla, stage_index=0)
    fresh = saved.fresh(config, 2)
    assert all(torch.equal(fresh[key], weight) for key, weight in ungrown.items())
    assert not any(weight.any() for key, weight in fresh.items() if key.endswith("adapter.linear_out.weight"))
    for name, scale in (("mlp.linear_fc1", 1.0), ("mlp.linear_fc2", (2 * 7) ** -0.5)):
        # Of 6144 numbers or more; the deviation of their standard deviation is 0.9 %.
        assert float(fresh[f"decoder.layers.5.{name}.weight"].std()) == pytest.approx(0.02 * scale, rel=0.04)


@pytest.mark.parametrize(
    ("growth", "stages", "layouts"),
    [
        ({"init": "identity"}, STAGES, ["one", "TP2 PP2"]),
        ({"operator": "stack", "init": "identity"}, REPEATED, ["one", "TP2 SP"]),
    ],
    ids=["interpolate", "stack"],
)
def test_identity_keeps_the_logits(
    saved: Saved, worlds: Worlds, growth: dict[str, Any], stages: dict[str, Any], layouts: list[str]
) -> None:
    writer = config_of("tied", "one", stages=stages, growth=growth)
    folder = saved.folder(writer, "one", 1)
    ((before, loss),) = worlds(1).run(outputs, config=writer, folder=folder, grown=False)
    for layout in layouts:
        for adapter in ({"at_stage_end": "merge"}, {"at_stage_end": "keep"}):
            config = config_of("tied", layout, stages=stages, growth=growth, adapter=adapter)
            after, grown_loss = worlds(LAYOUTS[layout][0]).run(outputs, config=config, folder=folder, grown=True)[0]
            # fp32 rounds in another order where adapters are merged or matrices split over ranks.
            assert grown_loss == pytest.approx(loss, rel=1e-6)
            if after is not None:
                assert float((after - before).norm() / before.norm()) < 1e-6


@pytest.mark.parametrize("layout", ["one", "TP2 PP2"])
def test_a_model_without_adapters_loads_them_merged(saved: Saved, worlds: Worlds, layout: str) -> None:
    folder = saved.folder(config_of("gated", "TP2 PP2"), "TP2 PP2", 1)
    config = config_of("gated", layout)
    loaded = worlds(LAYOUTS[layout][0]).run(merged_weights, config=config, folder=folder)[0]
    checkpoint, layers = read_checkpoint(newest(folder)), interpolated(6, (), "mean")
    expected = {key: expected_weight(key, checkpoint, loaded, layers, config) for key in loaded}
    assert wrong_weights(loaded, expected) == []
    assert not any(".adapter." in key for key in loaded)


# What the ranks run.


def write_stage(config: RunConfig, folder: Path, stage_index: int) -> None:
    """Train a stage to its end, from weights and adapters that are not those of the start, and save it."""
    with parallel_layout(config.parallel, 1) as parallel:
        plan = make_plan(resolve(config, VOCAB_SIZE))
        stage = plan.stages[stage_index]
        chunks = build_stage_model(config, stage, stage.first_step, VOCAB_SIZE, parallel)
        spread(chunks, parallel)
        state = make_trainable(chunks, config, plan, stage, stage.first_step, parallel)
        for step in range(stage.first_step, stage.last_step):
            train_step(state, made_up_batch(config, step, parallel), 2e-3, config, parallel, False)
        what = (state.chunks, state.optimizer, training_recipe(config), state.step, manifest_facts(config, stage_index))
        CheckpointSaver(folder, config.checkpoint, parallel).save(*what)


def grow(configs: list[RunConfig], folder: Path, fault: str | None = None) -> list[Tensors | None]:
    """Whole weights of the stage after the checkpoint's, for configs of one layout."""
    results = []
    with parallel_layout(configs[0].parallel, 1) as parallel:
        found = find_checkpoint(folder, "auto", parallel)
        name, spoil = FAULTS[fault]
        for config in configs:
            with patch.object(weights, name, spoil(getattr(weights, name))):
                state = first_state(config, make_plan(resolve(config, VOCAB_SIZE)), found, None, VOCAB_SIZE, parallel)
            results.append(whole(state, parallel, lambda weight: weight.detach()))
    return results


def initial_weights(config: RunConfig, stage_index: int) -> Tensors | None:
    """Weights of a stage's model that nothing is grown into."""
    with parallel_layout(config.parallel, 1) as parallel:
        plan = make_plan(resolve(config, VOCAB_SIZE))
        state = build_state(config, plan, plan.stages[stage_index], 0, VOCAB_SIZE, parallel)
        return whole(state, parallel, lambda weight: weight.detach())


def merged_weights(config: RunConfig, folder: Path) -> Tensors | None:
    """Weights of a checkpoint with six layers in a model that has no adapters."""
    model = replace(config.model, num_layers=6)
    with parallel_layout(config.parallel, 1) as parallel:
        found = find_checkpoint(folder, "auto", parallel)
        chunks = build_model(model, VOCAB_SIZE, parallel, config.training.precision, config.training.seed)
        load_merged(chunks, found, parallel)
        return whole(SimpleNamespace(chunks=chunks), parallel, lambda weight: weight.detach())


def outputs(config: RunConfig, folder: Path, grown: bool) -> tuple[Tensor | None, float]:
    """Logits, where one process has them all, and loss of a checkpoint's own model, or of the one grown from it."""
    with parallel_layout(config.parallel, 1) as parallel:
        found, plan = find_checkpoint(folder, "auto", parallel), make_plan(resolve(config, VOCAB_SIZE))
        if grown:
            state = first_state(config, plan, found, None, VOCAB_SIZE, parallel)
        else:
            state = build_state(config, plan, plan.stages[found.manifest.stage_index], 0, VOCAB_SIZE, parallel)
            load_weights(found.path, state.chunks, parallel)
        loss = evaluate_batch(state.chunks, made_up_batch(config, 7, parallel), config, parallel)
        if parallel.world_size > 1:
            return None, loss
        tokens = torch.arange(config.model.seq_length)[None] % VOCAB_SIZE
        return state.chunks[0](input_ids=tokens, position_ids=None, attention_mask=None).detach(), loss


# Faults: the function of growth/weights.py that is spoilt, and how.


def by_place(original: Callable[..., None]) -> Callable[..., None]:
    """A layer gets what belongs to the one as far from the model's bottom as it is from its rank's."""
    first: list[int] = []

    def grow_layer(shards: Any, layer: int, source: Any, stage: Stage, *rest: Any) -> None:
        first.append(layer)
        original(shards, layer, source, replace(stage, layers=stage.layers[:1] * first[0] + stage.layers), *rest)

    return grow_layer


FAULTS: dict[str | None, tuple[str, Callable[[Any], Any]]] = {
    None: ("_grow_layer", lambda original: original),
    "place on the rank": ("_grow_layer", by_place),
    "scaling": ("add_product", lambda original: lambda piece, a, b, scaling: original(piece, a, b, 1.0)),
    "rounded twice": ("_merged", lambda original: lambda *arguments: original(*arguments).bfloat16().float()),
}
