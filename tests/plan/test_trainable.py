"""The trainable weights of a stage by key, and the stage that began to train each."""

from typing import Any

import pytest
from small_run import VOCAB_SIZE, small_config

from megatron_step.config.run import RunConfig
from megatron_step.plan.names import in_layer, is_adapter, layer_of
from megatron_step.plan.old_layers import adapter_targets, turn_at
from megatron_step.plan.resolved import resolve
from megatron_step.plan.trainable import key_before, treatment, updates
from megatron_step.planner.plan import make_plan

STAGES = {"count": 3, "layers": [2, 1, 1]}  # layers by the stage that added them: 0 2 1 0
EMBEDDING, OUTPUT, NORM = "embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"


def _layer(number: int, name: str) -> str:
    return f"decoder.layers.{number}.{name}"


def _config(**sections: Any) -> RunConfig:
    return small_config(stages=STAGES, **sections)


def _all(config: RunConfig, index: int, key: str) -> tuple[bool, str, int]:
    found = treatment(key, make_plan(resolve(config, VOCAB_SIZE)).stages[index], config)
    return found.trained, found.role, found.since


def test_the_first_stage_trains_all() -> None:
    config = _config(freeze={"norms": True, "embedding": True, "output_layer": True, "final_norm": True})
    for key in (EMBEDDING, OUTPUT):
        assert _all(config, 0, key) == (True, "embedding", 0)
    for key in (NORM, _layer(1, "mlp.linear_fc2.weight"), _layer(0, "mlp.linear_fc1.layer_norm_weight")):
        assert _all(config, 0, key) == (True, "base", 0)


def test_old_matrices_are_frozen_and_their_norms_are_not() -> None:
    born = [layer.born for layer in make_plan(resolve(_config(), VOCAB_SIZE)).stages[2].layers]
    assert sorted(born) == [0, 0, 1, 2]
    for number, stage in enumerate(born):
        matrix = _all(_config(), 2, _layer(number, "self_attention.linear_qkv.weight"))
        assert matrix == ((True, "new_layer", 2) if stage == 2 else (False, "base", stage))
        bias = _all(_config(), 2, _layer(number, "self_attention.linear_qkv.bias"))
        assert bias == matrix
        for norm in ("self_attention.linear_qkv.layer_norm_weight", "self_attention.q_layernorm.weight"):
            assert _all(_config(), 2, _layer(number, norm)) == (True, "new_layer" if stage == 2 else "base", stage)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("embedding", EMBEDDING),
        ("output_layer", OUTPUT),
        ("final_norm", NORM),
        ("norms", _layer(0, "mlp.linear_fc1.layer_norm_weight")),
    ],
)
def test_each_key_freezes_its_own(name: str, key: str) -> None:
    assert _all(_config(), 1, key)[0]
    assert not _all(_config(freeze={name: True}), 1, key)[0]
    assert _all(_config(freeze={name: True}), 0, key)[0]


def test_growth_without_freezing_trains_all() -> None:
    config = _config(freeze={"layers": False})
    assert _all(config, 2, _layer(0, "mlp.linear_fc2.weight")) == (True, "base", 0)
    assert not any(
        adapter_targets(layer, make_plan(resolve(config, VOCAB_SIZE)).stages[2], config) for layer in range(4)
    )


def test_adapters_begin_anew_in_each_stage_or_with_the_layers_freezing() -> None:
    key = "self_attention.linear_qkv.adapter.linear_in.weight"
    kept = _config(adapter={"at_stage_end": "keep"})
    stage = make_plan(resolve(kept, VOCAB_SIZE)).stages[2]
    for number, layer in enumerate(stage.layers):
        assert bool(adapter_targets(number, stage, kept)) is (layer.born < 2)
        if layer.born < 2:
            assert _all(_config(), 2, _layer(number, key)) == (True, "adapter", 2)
            assert _all(kept, 2, _layer(number, key)) == (True, "adapter", layer.born + 1)


def test_a_stage_that_adds_no_layer_adapts_them_all() -> None:
    config = small_config(stages={"count": 2, "layers": [4, 0]})
    stage = make_plan(resolve(config, VOCAB_SIZE)).stages[1]
    assert all(adapter_targets(layer, stage, config) for layer in range(4))
    assert not adapter_targets(0, stage, small_config(stages={"count": 2, "layers": [4, 0]}, adapter={"rank": 0}))


def test_keys_name_layers() -> None:
    assert (layer_of(_layer(12, "mlp.linear_fc2.weight")), layer_of(EMBEDDING)) == (12, -1)
    assert in_layer(_layer(1, "mlp.linear_fc2.weight"), 11) == _layer(11, "mlp.linear_fc2.weight")
    assert is_adapter(_layer(1, "mlp.linear_fc2.adapter.linear_out.weight"))
    assert not is_adapter(_layer(1, "mlp.linear_fc2.weight"))


@pytest.mark.parametrize("order", ["cyclic", "random"])
@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_updates_are_the_steps_that_trained_the_states(moments: str, order: str) -> None:
    rotation = {"policy": "rotate", "turn_steps": 2, "moments": moments, "order": order}
    stages = {"count": 3, "layers": [3, 2, 2], "steps": [4, 9, 11], "grow_at": 1.0}
    config = small_config(model={"num_layers": 7, "num_query_groups": 2}, stages=stages, old_layers=rotation)
    plan = make_plan(resolve(config, VOCAB_SIZE))
    seen: dict[str, int] = {}
    for stage in plan.stages:
        keys = [_layer(number, "mlp.linear_fc2.weight") for number in range(stage.num_layers)]
        kept = {key for key in keys if moments == "keep" and stage.layers[layer_of(key)].born < stage.index}
        seen = {key: seen[key_before(key, stage)] if key in kept else 0 for key in keys}
        for step in range(stage.first_step, stage.last_step):
            for key in keys:
                trained = treatment(key, stage, config, turn_at(step, stage, config)).trained
                if trained:
                    assert updates(key, plan.stages[: stage.index + 1], config, step) == seen[key]
                seen[key] = seen[key] + 1 if trained else seen[key] if moments == "keep" else 0


def test_updates_of_weights_outside_the_layers_and_of_adapters() -> None:
    config = _config(adapter={"at_stage_end": "keep"})
    plan = make_plan(resolve(config, VOCAB_SIZE))
    last = plan.stages[2]
    for key, first in (
        (EMBEDDING, 0),
        (_layer(0, "mlp.linear_fc1.layer_norm_weight"), 0),
        (_layer(0, "self_attention.linear_qkv.adapter.linear_in.weight"), plan.stages[1].first_step),
    ):
        assert updates(key, plan.stages, config, last.first_step + 3) == last.first_step + 3 - first
