"""A process starts from the run's state: at the start, in a stage, between stages, or with another run's weights."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_corpus import REPOSITORY
from small_run import VOCAB_SIZE, made_up_batch, manifest_facts, small_config

from megatron_step.checkpoint.load import FoundCheckpoint, find_checkpoint
from megatron_step.checkpoint.save import CheckpointSaver
from megatron_step.config.data import DataConfig
from megatron_step.config.run import RunConfig
from megatron_step.data.preprocess import preprocess
from megatron_step.data.train_tokenizer import train_tokenizer
from megatron_step.engine.parallel import Parallel, parallel_layout, stop_world
from megatron_step.plan.resolved import resolve
from megatron_step.plan.states import training_recipe
from megatron_step.planner.plan import make_plan
from megatron_step.training.entry import first_state, next_stage
from megatron_step.training.run import run
from megatron_step.training.state import TrainState, build_state, initial_state
from megatron_step.training.step import train_step

STAGES: dict[str, Any] = {"count": 2, "layers": [3, 1], "steps": [4, 6]}
"""Growth after step 3, three quarters of the first stage's."""
TOKENIZER: Any = SimpleNamespace(fingerprint="of every run but one")
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The checkpoint of another run, which has trained its model of four layers for two steps."""
    folder = tmp_path_factory.mktemp("other")
    with parallel_layout(small_config().parallel, seed=1) as parallel:
        _train_and_save(initial_state(small_config(), VOCAB_SIZE, parallel), folder, small_config(), 2, parallel)
    stop_world()
    yield folder / "step_00000002"


def _train_and_save(state: TrainState, folder: Path, config: RunConfig, steps: int, parallel: Parallel) -> None:
    for _ in range(steps):
        train_step(state, made_up_batch(config, state.step, parallel), 1e-2, config, parallel, False)
    saver = CheckpointSaver(folder, config.checkpoint, parallel)
    facts = {**manifest_facts(config, state.stage.index), "data_fingerprint": {"tokenizer": TOKENIZER.fingerprint}}
    saver.save(state.chunks, state.optimizer, training_recipe(config), state.step, facts)


def _first(config: RunConfig, parallel: Parallel, found: FoundCheckpoint | None = None) -> TrainState:
    return first_state(config, make_plan(resolve(config, VOCAB_SIZE)), found, TOKENIZER, VOCAB_SIZE, parallel)


def _weights(state: TrainState) -> Weights:
    params = state.chunks[0].module.named_parameters()
    return {name.removeprefix("module."): param.detach().clone().float() for name, param in params}


def _moments(state: TrainState) -> list[torch.Tensor]:
    (part,) = state.optimizer.chained_optimizers
    return [moment[name].clone() for moment in part.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]


def _counts(state: TrainState) -> set[int]:
    return {int(group["step"]) for group in state.optimizer.param_groups if group["params"]}


def test_a_fresh_run_begins_with_initial_weights(alone: Parallel) -> None:
    config = small_config(stages=STAGES)
    state = _first(config, alone)
    expected = _weights(initial_state(config, VOCAB_SIZE, alone))
    assert (state.step, state.stage.index, state.growth_peak_bytes) == (0, 0, None)
    assert len(state.chunks[0].module.decoder.layers) == 3
    assert all(torch.equal(weight, expected[name]) for name, weight in _weights(state).items())


def test_a_checkpoint_in_a_stage_is_gone_on_from(alone: Parallel, tmp_path: Path) -> None:
    config = small_config(stages=STAGES)
    before = initial_state(config, VOCAB_SIZE, alone)
    _train_and_save(before, tmp_path, config, 2, alone)
    state = _first(config, alone, find_checkpoint(tmp_path, "auto", alone))
    assert (state.step, state.stage.index, state.growth_peak_bytes) == (2, 0, None)
    expected = _weights(before)
    assert all(torch.equal(weight, expected[name]) for name, weight in _weights(state).items())
    assert all(torch.equal(one, same) for one, same in zip(_moments(state), _moments(before)))
    assert _counts(state) == {2}


@pytest.mark.parametrize("at_stage_end", ["merge", "keep"])
def test_a_process_that_starts_between_stages_grows_as_one_that_goes_through(
    alone: Parallel, tmp_path: Path, at_stage_end: str
) -> None:
    stages = {"count": 3, "layers": [2, 1, 1], "steps": 4}
    config = small_config(str(tmp_path), stages=stages, adapter={"at_stage_end": at_stage_end})
    plan = make_plan(resolve(config, VOCAB_SIZE))
    state = initial_state(config, VOCAB_SIZE, alone)
    for stage in plan.stages[:-1]:
        _train_and_save(state, tmp_path / "checkpoints", config, stage.last_step - state.step, alone)
        grown = next_stage(state, config, plan, VOCAB_SIZE, alone)
        assert (state.chunks, state.optimizer) == ([], None), "the smaller model is released"
        started = _first(config, alone, find_checkpoint(tmp_path / "checkpoints", "auto", alone))
        expected = _weights(grown)
        for found in (grown, started):
            assert (found.step, found.stage.index) == (stage.last_step, stage.index + 1)
            assert found.growth_peak_bytes > 0
        assert all(torch.equal(weight, expected[name]) for name, weight in _weights(started).items())
        assert all(torch.equal(one, same) for one, same in zip(_moments(started), _moments(grown)))
        assert _counts(started) == _counts(grown)
        state = grown
    assert len(state.chunks[0].module.decoder.layers) == 4


def test_another_runs_weights_come_without_its_moments_and_step(alone: Parallel, other: Path) -> None:
    state = _first(small_config(stages={"start_from": str(other)}), alone)
    assert state.step == 0
    expected = _weights(_first(small_config(), alone, find_checkpoint(other.parent, "auto", alone)))
    assert all(torch.equal(weight, expected[name]) for name, weight in _weights(state).items())
    assert not any(moment.any() for moment in _moments(state))
    assert _counts(state) == {0}


def test_a_size_may_be_given_or_left_to_its_default(alone: Parallel, other: Path) -> None:
    model = {"num_query_groups": 2, "head_size": 16}  # a width of 64 over four heads
    _first(small_config(model=model, stages={"start_from": str(other)}), alone)  # raises nothing
    with pytest.raises(ValueError, match=r"a model with other settings: model\.num_query_groups 2 -> 4"):
        _first(small_config(model={"head_size": 16}, stages={"start_from": str(other)}), alone)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_another_runs_weights_are_rounded_to_this_ones_precision(
    alone: Parallel, tmp_path: Path, precision: str
) -> None:
    its = small_config(training={"precision": {"bf16": "fp32", "fp32": "bf16"}[precision]})
    _train_and_save(initial_state(its, VOCAB_SIZE, alone), tmp_path, its, 1, alone)
    start_from = str(tmp_path / "step_00000001")
    state = _first(small_config(training={"precision": precision}, stages={"start_from": start_from}), alone)
    expected = _weights(_first(its, alone, find_checkpoint(tmp_path, "auto", alone)))
    weights = _weights(state)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name].bfloat16().float()) for name, weight in weights.items())
    main = torch.cat([param.flatten() for group in state.optimizer.param_groups for param in group["params"]])
    assert main.dtype == torch.float32
    assert torch.equal(main.sort()[0], torch.cat([weight.flatten() for weight in weights.values()]).sort()[0])


def test_a_first_stage_of_no_steps_grows_at_once(alone: Parallel, other: Path) -> None:
    stages = {"count": 2, "layers": [4, 1], "steps": [0, 5], "start_from": str(other)}
    config = small_config(model={"num_layers": 5, "num_query_groups": 2}, stages=stages)
    state = _first(config, alone)
    assert (state.step, state.stage.index) == (0, 1)
    expected = _weights(_first(small_config(), alone, find_checkpoint(other.parent, "auto", alone)))
    weights = _weights(state)
    # The new layer is the fourth, the mean of the two around it.
    for number, source in {0: 0, 1: 1, 2: 2, 4: 3}.items():
        names = [name for name in expected if name.startswith(f"decoder.layers.{source}.")]
        assert names
        for name in names:
            kept = name.replace(f"layers.{source}.", f"layers.{number}.")
            assert torch.equal(weights[kept], expected[name]), kept
    mean = (expected["decoder.layers.2.mlp.linear_fc1.weight"] + expected["decoder.layers.3.mlp.linear_fc1.weight"]) / 2
    assert torch.equal(weights["decoder.layers.3.mlp.linear_fc1.weight"], mean)
    assert not any(moment.any() for moment in _moments(state))
    assert _counts(state) == {0}
    train_step(state, made_up_batch(config, 0, alone), 1e-3, config, alone, False)


def test_the_adapters_of_another_run_are_merged(alone: Parallel, tmp_path: Path) -> None:
    its = small_config(stages=STAGES, adapter={"rank": 4, "alpha": 12, "at_stage_end": "keep"})
    plan = make_plan(resolve(its, VOCAB_SIZE))
    before = build_state(its, plan, plan.stages[1], plan.stages[1].first_step, VOCAB_SIZE, alone)
    _train_and_save(before, tmp_path, its, 3, alone)
    start_from = str(tmp_path / f"step_{before.step:08d}")
    # This run's own adapters have another rank and scaling.
    state = _first(small_config(stages={"start_from": start_from}, adapter={"rank": 2, "alpha": 2}), alone)
    linear = before.chunks[0].module.decoder.layers[0].mlp.linear_fc2
    product = 3.0 * linear.adapter.linear_out.weight @ linear.adapter.linear_in.weight
    assert product.any()
    merged = state.chunks[0].module.decoder.layers[0].mlp.linear_fc2
    assert merged.adapter is None
    torch.testing.assert_close(merged.weight, linear.weight + product)
    # So they are where a stage of this run, which keeps its adapters, has some on the same layers.
    stages = {"count": 2, "layers": [4, 1], "steps": [0, 5], "start_from": start_from}
    model = {"num_layers": 5, "num_query_groups": 2}
    state = _first(small_config(model=model, stages=stages, adapter=vars(its.adapter)), alone)
    merged = state.chunks[0].module.decoder.layers[0].mlp.linear_fc2
    torch.testing.assert_close(merged.weight, linear.weight + product)
    assert not merged.adapter.linear_out.weight.any()


@pytest.mark.parametrize(
    ("model", "vocab_size", "stages", "message"),
    [
        (
            {"num_layers": 6},
            VOCAB_SIZE,
            {},
            "has 4 layers, but the first stage has 6: set stages.layers to begin with 4",
        ),
        ({}, VOCAB_SIZE, {"count": 2, "layers": [3, 1]}, "has 4 layers, but the first stage has 3"),
        ({"hidden_size": 32}, VOCAB_SIZE, {}, "has a model with other settings: model.hidden_size 64 -> 32"),
        ({"rope_theta": 5e5}, VOCAB_SIZE, {}, "has a model with other settings: model.rope_theta 10000.0 -> 500000.0"),
        (
            {"mlp": "gelu", "qk_norm": True},
            VOCAB_SIZE,
            {},
            "a model with other settings: model.mlp swiglu -> gelu, model.qk_norm False -> True",
        ),
        ({"tie_embeddings": True}, VOCAB_SIZE, {}, "model.tie_embeddings False -> True"),
        ({}, 251, {}, "a vocabulary of 250 tokens, not the 251 of unused: use the tokenizer that it was trained with"),
    ],
    ids=["depth", "depth of the first stage", "width", "rotary", "architecture", "tied", "vocabulary"],
)
def test_another_model_is_refused_in_one_line(
    alone: Parallel, other: Path, model: dict[str, Any], vocab_size: int, stages: dict[str, Any], message: str
) -> None:
    config = small_config(model={"num_query_groups": 2, **model}, stages={"start_from": str(other), **stages})
    with pytest.raises(ValueError) as caught:
        first_state(config, make_plan(resolve(config, vocab_size)), None, TOKENIZER, vocab_size, alone)
    assert message in str(caught.value)
    assert f"stages.start_from {other}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["nowhere", "none", "auto"])
def test_a_start_that_is_not_there_is_named(
    alone: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"there is no checkpoint {path}"):
        _first(small_config(stages={"start_from": path}), alone)


def test_another_tokenizer_of_the_same_size_is_refused(small_data: DataConfig, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"steps": 1, "evaluation": {"steps": 0}}
    assert run(small_config(str(tmp_path / "first"), data=small_data, **sections))
    start = {"start_from": str(tmp_path / "first/checkpoints/step_00000001")}
    assert run(small_config(str(tmp_path / "second"), data=small_data, stages=start, **sections))
    text = tmp_path / "text.txt"
    text.write_text((REPOSITORY / "examples/data/sotu.txt").read_text(encoding="utf-8")[:150_000], encoding="utf-8")
    tokenizer, prefix = str(tmp_path / "tokenizer.model"), str(tmp_path / "corpus")
    train_tokenizer([text], tokenizer, vocab_size=400)
    preprocess([text], prefix, tokenizer, separator="\n\n")
    data = DataConfig(train=[(1.0, prefix)], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="was trained with another tokenizer than .*: use that one"):
        run(small_config(str(tmp_path / "third"), data=data, stages=start, **sections))
    assert not (tmp_path / "third").exists()
