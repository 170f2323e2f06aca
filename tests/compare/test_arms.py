"""An arm is the comparison's config with the keys of a way of training."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from comparisons import BASE

from megatron_step.compare.arms import ARMS, arm_config, arm_name, arm_run, check_comparable
from megatron_step.plan.resolved import resolve
from megatron_step.planner.plan import make_plan


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_trains_the_same_model_for_as_many_steps(name: str) -> None:
    config = arm_config(name, BASE, Path("out"))
    plan = make_plan(resolve(config, 256))
    assert plan.num_steps == 100
    assert plan.stages[-1].num_layers == 8
    assert config.output_dir == f"out/{name}"
    check_comparable([arm_config("vanilla", BASE, Path("out")), config])


def test_vanilla_is_one_stage_with_full_states_under_the_same_schedule() -> None:
    vanilla, parity = (arm_config(name, BASE, Path("out")) for name in ("vanilla", "parity"))
    assert (vanilla.stages.count, vanilla.optimizer.states) == (1, "full")
    assert vanilla.schedule == parity.schedule


def test_a_file_of_keys_is_an_arm(tmp_path: Path) -> None:
    path = tmp_path / "deep.yaml"
    path.write_text(yaml.safe_dump({"preset": "parity", "stages": {"shares": [0.2, 0.2, 0.6]}}))
    config = arm_config(str(path), BASE, Path("out"))
    assert (arm_name(str(path)), config.stages.shares, config.stages.steps) == ("deep", [0.2, 0.2, 0.6], 100)


def test_a_run_has_its_rate_and_seed_and_a_folder_of_its_own() -> None:
    run = arm_run(arm_config("parity", BASE, Path("out")), "parity", 2e-3, 3)
    assert run.folder == Path("out/parity/rate_0.002/seed_3")
    assert (run.config.optimizer.learning_rate, run.config.training.seed, run.config.data.seed) == (2e-3, 3, 3)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("vanila", {}, "arm vanila is unknown: choose from vanilla, vanilla_muon, parity"),
        (
            "parity",
            {"training": {**BASE["training"], "precision": "fp32"}},
            "arm parity: optimizer.states compact needs",
        ),
        ("parity", {"data": {"train": [[1.0, "a"]], "tokenizer": "t"}}, "needs validation text"),
    ],
)
def test_what_cannot_be_compared_is_refused(name: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arm_config(name, {**BASE, "evaluation": {"interval": 0}, **changed}, Path("out"))


def test_arms_on_other_tokens_are_refused() -> None:
    configs = [arm_config("vanilla", {**BASE, "stages": {"steps": steps}}, Path("out")) for steps in (100, 200)]
    with pytest.raises(ValueError, match=r"differ in stages.steps, 100 and 200: a comparison needs the same model"):
        check_comparable(configs)
