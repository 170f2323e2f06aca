"""The steps that save a checkpoint, the manifest, and the changes that a resumed run may not make."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_run import VOCAB_SIZE, small_config

from megatron_step.checkpoint.manifest import Manifest
from megatron_step.checkpoint.save import SaveError
from megatron_step.config.run import RampUpConfig, RunConfig
from megatron_step.config.stages import OldLayersConfig
from megatron_step.engine.parallel import Parallel
from megatron_step.plan.resolved import resolve
from megatron_step.planner.plan import make_plan
from megatron_step.training.hooks.saving import check_resumable, description, saving_hook
from megatron_step.training.stage import StepContext
from megatron_step.training.state import TrainState

_FINGERPRINT: dict[str, Any] = {"corpora": [], "seed": 1}


class _Saver:
    """Notes the steps it saved; fails at chosen ones, at once or, as an asynchronous save does, when it is finished."""

    def __init__(self, fails_at: tuple[int, ...] = (), fails_later_at: tuple[int, ...] = ()) -> None:
        self.saved: list[int] = []
        self.finished: list[int] = []
        self._fails_at, self._fails_later_at = fails_at, fails_later_at
        self._pending: int | None = None

    def poll(self) -> None:
        """A pending save takes until it is waited for."""

    def finish(self) -> None:
        step, self._pending = self._pending, None
        if step in self._fails_later_at:
            raise SaveError(f"the disk was full at step {step}")
        self.finished += [] if step is None else [step]

    def save(self, chunks: Any, optimizer: Any, precision: str, step: int, described: dict[str, Any]) -> int:
        if step in self._fails_at:
            raise SaveError(f"no room for step {step}")
        assert described["consumed_samples"] == 8 * step
        self.saved.append(step)
        self._pending = step
        return 2 * torch.empty(1 << 18).nbytes  # it copies 1 MiB


def _run_hook(saver: _Saver, config: RunConfig, parallel: Parallel, last: int) -> TrainState:
    plan = make_plan(resolve(config, VOCAB_SIZE))
    describe = description(config, plan, VOCAB_SIZE, _FINGERPRINT, parallel)
    hook = saving_hook(saver, config, describe, [3 << 20], parallel)  # type: ignore[arg-type]
    state = TrainState(step=0, stage=plan.stages[0], chunks=[], optimizer=None, plan=plan)
    for step in range(1, last + 1):
        state.step = step
        hook(StepContext(state, {}, None, is_last=step == last))
    return state


@pytest.mark.parametrize(("interval", "steps"), [(3, [3, 6, 7]), (0, [7])])
def test_a_checkpoint_every_interval_and_at_the_end(alone: Parallel, interval: int, steps: list[int]) -> None:
    saver = _Saver()
    _run_hook(saver, small_config(checkpoint={"interval": interval}), alone, last=7)
    assert saver.saved == saver.finished == steps


def test_a_save_in_between_may_fail(alone: Parallel, capsys: pytest.CaptureFixture[str]) -> None:
    saver = _Saver(fails_at=(2,), fails_later_at=(4,))
    _run_hook(saver, small_config(checkpoint={"interval": 2}), alone, last=7)
    assert saver.finished == [6, 7]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert warnings[0].startswith("warning: no room for step 2; training goes on")
    assert warnings[1].startswith("warning: the disk was full at step 4; training goes on")


@pytest.mark.parametrize(("asynchronous", "measured"), [(False, 1), (True, 2)])
def test_the_first_save_of_a_stage_says_what_it_took(
    alone: Parallel, capsys: pytest.CaptureFixture[str], asynchronous: bool, measured: int
) -> None:
    """A saver that copies 1 MiB and writes 2: an asynchronous save keeps what it writes until it is written."""
    config = small_config(checkpoint={"interval": 2, "asynchronous": asynchronous})
    state = _run_hook(_Saver(), config, alone, last=4)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("checkpoint of step")]
    assert line.startswith("checkpoint of step 2: ")
    assert " s, at most 2.0 MiB written by a rank; " in line
    assert line.endswith(f"planned / measured: 3.0 / {measured}.0")
    assert state.save_memory == {"save_host_bytes": measured << 20, "planned_save_host_bytes": 3 << 20}


@pytest.mark.parametrize("fails", [{"fails_at": (7,)}, {"fails_later_at": (7,)}])
def test_the_last_save_may_not_fail(alone: Parallel, fails: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(SaveError, match="step 7"):
        _run_hook(_Saver(**fails), small_config(), alone, last=7)


def _manifest(config: RunConfig, parallel: Parallel, step: int = 5) -> Manifest:
    plan = make_plan(resolve(config, VOCAB_SIZE))
    state = TrainState(step=step, stage=plan.stage_at(step), chunks=[], optimizer=None, plan=plan)
    described = description(config, plan, VOCAB_SIZE, _FINGERPRINT, parallel)(state)
    return Manifest(step=step, files={}, **described)


def _check(manifest: Manifest, config: RunConfig, vocab_size: int = VOCAB_SIZE) -> None:
    check_resumable(manifest, config, make_plan(resolve(config, vocab_size)), vocab_size, _FINGERPRINT)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"hidden_size": 128}},
        {"training": {"global_batch_size": 16}},
        {"training": {"precision": "bf16"}},
        {"training": {"ramp_up": RampUpConfig(2, 2, 10)}},
        {"growth": {"init": "copy"}},
        {"freeze": {"norms": True}},
        {"adapter": {"restart_interval": 5}},
        {"optimizer": {"rule": "muon"}},
    ],
    ids=["hidden_size", "global_batch_size", "precision", "ramp_up", "init", "norms", "restart_interval", "rule"],
)
def test_another_run_is_refused_by_the_name_of_what_differs(
    alone: Parallel, change: dict, request: pytest.FixtureRequest
) -> None:
    manifest = _manifest(small_config(), alone)
    name = request.node.callspec.id
    with pytest.raises(ValueError, match=rf"was saved with other settings: \w+\.{name} .* -> "):
        _check(manifest, small_config(**change))


def test_a_checkpoint_of_an_earlier_version_is_adamws(alone: Parallel) -> None:
    manifest = _manifest(small_config(), alone)
    del manifest.config["optimizer"]["rule"]
    _check(manifest, small_config())
    with pytest.raises(
        ValueError, match=r"saved with other settings: optimizer\.rule adamw -> muon\. Restore these keys"
    ):
        _check(manifest, small_config(optimizer={"rule": "muon"}))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"active_share": 0.25}, "old_layers.active_share 0.5 -> 0.25"),
        ({"turn_steps": 3}, "old_layers.turn_steps 2 -> 3"),
        ({"moments": "reset"}, "old_layers.moments keep -> reset"),
        ({"order": "random"}, "old_layers.order cyclic -> random"),
        ({"policy": "trained", "turn_steps": 3}, "old_layers.policy rotate -> trained"),
    ],
)
def test_other_turns_are_refused(alone: Parallel, keys: dict[str, Any], words: str) -> None:
    rotation, stages = {"policy": "rotate", "turn_steps": 2}, {"count": 2, "layers": [3, 1]}
    manifest = _manifest(small_config(stages=stages, old_layers=rotation), alone)
    with pytest.raises(ValueError, match=words):
        _check(manifest, small_config(stages=stages, old_layers={**rotation, **keys}))


def test_another_seed_is_refused_where_it_orders_the_turns(alone: Parallel) -> None:
    for order in ("cyclic", "random"):
        rotation = {"policy": "rotate", "turn_steps": 2, "order": order}
        config = small_config(stages={"count": 2, "layers": [3, 1]}, old_layers=rotation)
        other = replace(config, training=replace(config.training, seed=2))
        if order == "cyclic":
            _check(_manifest(config, alone), other)
        else:
            with pytest.raises(ValueError, match="training.seed 1 -> 2"):
                _check(_manifest(config, alone), other)


def test_another_vocabulary_is_refused(alone: Parallel) -> None:
    with pytest.raises(ValueError, match="vocabulary 250 -> 251"):
        _check(_manifest(small_config(), alone), small_config(), VOCAB_SIZE + 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": 2, "layers": [2, 2], "steps": 8}, "last step of stage 1 8 -> 6"),
        ({"count": 2, "layers": [3, 1]}, "new layers of stage 1 2 -> 3"),
        ({"count": 1}, "stages.count 2 -> 1"),
    ],
)
def test_another_plan_is_refused(alone: Parallel, change: dict[str, Any], words: str) -> None:
    saved = small_config(stages={"count": 2, "layers": [2, 2]})
    with pytest.raises(ValueError, match=words):
        _check(_manifest(saved, alone), small_config(stages=change))


def test_another_growth_is_refused(alone: Parallel) -> None:
    saved = small_config(stages={"count": 2, "layers": [3, 1]})
    other = replace(saved, growth=replace(saved.growth, position="lower"))
    with pytest.raises(ValueError, match=r"growth\.position upper -> lower, place or sources of the layers of stage 2"):
        _check(_manifest(saved, alone), other)


def test_layout_micro_batch_and_learning_rate_may_change(alone: Parallel) -> None:
    other = small_config(parallel={"tensor_parallel_size": 2}, training={"micro_batch_size": 4})
    other = replace(other, optimizer=replace(other.optimizer, learning_rate=1.0))
    _check(_manifest(small_config(), alone), other)


def test_the_policy_for_old_layers_follows_a_run_by_what_it_comes_to(alone: Parallel) -> None:
    config = small_config(stages={"count": 2, "layers": [3, 1]})
    manifest = _manifest(config, alone)
    named = replace(config, old_layers=OldLayersConfig("adapters"))
    _check(manifest, named)  # raises nothing: the default came to the same
    older = {key: section for key, section in manifest.config.items() if key != "old_layers"}
    _check(replace(manifest, config=older), named)  # a checkpoint from before the key
    with pytest.raises(ValueError, match="old_layers.policy adapters -> frozen. Restore these keys to go on"):
        _check(replace(manifest, config=older), replace(config, old_layers=OldLayersConfig("frozen")))
