"""A first config is the value that its text holds, and fits the machines."""

from pathlib import Path

import pytest

from megatron_step.cli.machines import machines
from megatron_step.cli.sizes import SIZES
from megatron_step.cli.starting_config import starting_config, starting_text
from megatron_step.config.load import load_config

CASES = [
    ("2m", "cpu"),
    ("125m", "8x80gb"),
    ("125m", "1x24gb"),
    ("7b", "8x80gb"),
    ("70b", "8x8x80gb"),
    ("1.3b", "6x40gb"),
]


@pytest.mark.parametrize(("size", "machine"), CASES)
def test_the_text_holds_the_config_and_the_plan_fits(size: str, machine: str, tmp_path: Path) -> None:
    config, planned = starting_config(SIZES[size], machines(machine), machine == "cpu", None)
    path = tmp_path / "config.yaml"
    path.write_text(starting_text(config, size, machine, planned))
    assert load_config(["--config", str(path)]) == config
    assert planned.status in ("optimal", "feasible")
    assert planned.peak_bytes < planned.vanilla.peak_bytes


def test_steps_are_those_of_twenty_tokens_a_parameter() -> None:
    config, planned = starting_config(SIZES["125m"], machines("8x80gb"), False, None)
    tokens = planned.plan.num_steps * config.training.global_batch_size * config.model.seq_length
    assert tokens == pytest.approx(20 * SIZES["125m"].parameters, rel=0.1)
    few, _ = starting_config(SIZES["2m"], machines("cpu"), True, 20)
    assert (few.stages.steps, few.schedule.warmup_steps) == (20, 1)


def test_a_model_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="no layout of this model fits 1 GPU with 7.2 GiB each: choose a smaller"):
        starting_config(SIZES["13b"], machines("1x8gb"), False, 100)
