"""Each step gets the samples of its position, whatever step the process begins at."""

import pytest
import torch
from small_run import small_config

from megatron_step.config.data import DataConfig
from megatron_step.config.run import RampUpConfig
from megatron_step.data.datasets import Datasets
from megatron_step.data.tokenizer import load_tokenizer
from megatron_step.engine.parallel import Parallel
from megatron_step.training.batches import run_datasets, training_batches, validation_reader


@pytest.mark.parametrize("ramp_up", [None, RampUpConfig(4, 2, 12)], ids=["constant", "ramp-up"])
def test_a_later_start_gives_the_same_steps(
    alone: Parallel, small_data: DataConfig, ramp_up: RampUpConfig | None
) -> None:
    config = small_config(data=small_data, steps=6, training={"ramp_up": ramp_up})
    datasets = run_datasets(config, config.stages.steps, load_tokenizer(small_data.tokenizer), alone)
    steps = []
    for first in (0, 3):
        with training_batches(datasets, config, alone, range(first, config.stages.steps)) as stream:
            steps.append([torch.cat([batch["tokens"] for batch in step if batch is not None]) for step in stream])
    assert [len(some) for some in steps] == [6, 3]
    for whole, later in zip(steps[0][3:], steps[1]):
        assert torch.equal(whole, later)
    sizes = [len(step) for step in steps[0]]
    assert sizes == ([8] * 6 if ramp_up is None else [4, 4, 6, 8, 8, 8])


def test_labels_are_the_next_tokens(alone: Parallel, small_data: DataConfig) -> None:
    config = small_config(data=small_data, steps=1)
    datasets = run_datasets(config, config.stages.steps, load_tokenizer(small_data.tokenizer), alone)
    with training_batches(datasets, config, alone, range(config.stages.steps)) as stream:
        (step,) = list(stream)
    assert len(step) == 4
    for batch in step:
        assert batch is not None
        assert batch["tokens"].shape == batch["labels"].shape == (2, 32)
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])


def test_the_validation_set_is_fixed(alone: Parallel, small_data: DataConfig) -> None:
    config = small_config(data=small_data, evaluation={"steps": 2})
    read = validation_reader(
        run_datasets(config, config.stages.steps, load_tokenizer(small_data.tokenizer), alone), config, alone
    )
    first, again, second = (torch.cat([batch["tokens"] for batch in read(index) if batch]) for index in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_a_rank_without_data_gets_as_many_empty_micro_batches(alone: Parallel) -> None:
    config = small_config(steps=2)
    with training_batches(Datasets(None, None), config, alone, range(config.stages.steps)) as stream:
        assert list(stream) == [[None] * 4] * 2
    assert validation_reader(Datasets(None, None), config, alone)(0) == [None] * 4
