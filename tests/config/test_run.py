"""A run's sections fit one another and the world, and its batches add up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import small_config

from megatron_step.config.data import DataConfig
from megatron_step.config.run import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    RampUpConfig,
    RunConfig,
    TrainingConfig,
    batch_size_at,
    check_world,
    consumed_samples,
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainingConfig(0, 1), "global_batch_size must be at least 1"),
        (lambda: TrainingConfig(8, 1, RampUpConfig(2, 4, 10)), "in increments of 4: set .*increment to 3 or 6"),
        (lambda: RampUpConfig(0, 1, 1), "at least 1"),
        (lambda: EvaluationConfig(interval=-1), "must be at least 0, not -1"),
        (lambda: CheckpointConfig(keep=-1), "must be at least 0, not -1"),
        (lambda: CheckpointConfig(resume=""), "auto, none or the path"),
        (lambda: LoggingConfig(interval=0), "at least 1"),
        (
            lambda: LoggingConfig(wandb="team/project"),
            "'team/project' is not a valid name of a Weights & Biases project",
        ),
        (lambda: LoggingConfig(wandb=""), "take 1 to 128 characters"),
        (lambda: small_config(output_dir=""), "output_dir is empty"),
        (lambda: small_config(evaluation={"interval": 5}, data=_UNSPLIT), "there is no validation text"),
        (lambda: small_config(stages={"count": 2, "layers": [3, 2]}), r"\[3, 2\] add up to 5 layers.*num_layers is 4"),
        (lambda: small_config(stages={"count": 5}), "stages.count 5 is more than model.num_layers 4"),
        (
            lambda: small_config(stages={"count": 2}, adapter={"rank": 3}, parallel={"tensor_parallel_size": 2}),
            "adapter.rank 3 is not divisible by parallel.tensor_parallel_size 2, .*: set adapter.rank to 2 or 4",
        ),
        (
            lambda: small_config(parallel={"tensor_parallel_size": 3}),
            "num_attention_heads 4 is not divisible .*size 3: set parallel.tensor_parallel_size to 2",
        ),
        (
            lambda: small_config(
                model={"num_attention_heads": 6, "hidden_size": 96, "num_query_groups": 3},
                parallel={"tensor_parallel_size": 3},
            ),
            "vocab_size_multiple 128 is not divisible by .* 3: set model.vocab_size_multiple to 126 or 129, or "
            "parallel.tensor_parallel_size to 1",
        ),
        (lambda: small_config(model={"hidden_size": 66}), "set model.hidden_size to 64 or 72, or .*heads to 3 or 11"),
        (lambda: small_config(model={"num_query_groups": 3}), "set model.num_query_groups to 2 or 4"),
        (lambda: small_config(model={"head_size": 15}), "set model.head_size to 14 or 16"),
        (lambda: small_config(parallel={"tensor_parallel_size": 4}), "num_query_groups 2 is not divisible"),
        (
            lambda: small_config(
                model={"seq_length": 33}, parallel={"tensor_parallel_size": 2, "sequence_parallel": True}
            ),
            "seq_length 33 is not divisible",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


_UNSPLIT = DataConfig(train=[(1.0, "a")], tokenizer="t")


def _config(parallel: dict | None = None, **training: object) -> RunConfig:
    return small_config(parallel=parallel, training=training)


@pytest.mark.parametrize(
    ("config", "world_size", "message"),
    [
        (
            _config(),
            3,
            "a global batch of 8 samples is not divisible by training.micro_batch_size 2 x data-parallel size 3: "
            "set training.global_batch_size to 6 or 12",
        ),
        (
            _config({"tensor_parallel_size": 2}),
            3,
            "3 ranks does not fit .*: start .* 2 ranks, such as 2 or 4",
        ),
        (
            _config(ramp_up=RampUpConfig(2, 2, 9)),
            2,
            "a global batch of 2 samples .* ramp_up.increment to multiples of 4",
        ),
        (
            _config({"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}, micro_batch_size=8),
            2,
            "the number of micro-batches, 1, is not a multiple of parallel.pipeline_parallel_size 2, .*: "
            "set training.global_batch_size to 16, or training.micro_batch_size to 4",
        ),
    ],
)
def test_a_world_that_does_not_fit_is_refused(config: RunConfig, world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_world(config, world_size)


def test_a_world_that_fits_is_taken() -> None:
    for world_size in (1, 2, 4):
        check_world(_config(), world_size)


def test_the_batch_grows_in_equal_shares_of_the_ramp() -> None:
    training = TrainingConfig(8, 1, RampUpConfig(start=2, increment=2, samples=30))
    assert training.batch_sizes == (2, 4, 6, 8)
    assert [batch_size_at(training, consumed) for consumed in (0, 9, 10, 19, 20, 29, 30, 1000)] == [
        2,
        2,
        4,
        4,
        6,
        6,
        8,
        8,
    ]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5), st.integers(1, 60), st.integers(0, 40))
def test_consumed_samples_are_the_sum_of_the_batches(
    start: int, increment: int, increments: int, samples: int, steps: int
) -> None:
    training = TrainingConfig(start + increment * increments, 1, RampUpConfig(start, increment, samples))
    consumed = 0
    for _ in range(steps):
        size = batch_size_at(training, consumed)
        assert size in training.batch_sizes
        consumed += size
    assert consumed_samples(training, steps) == consumed
