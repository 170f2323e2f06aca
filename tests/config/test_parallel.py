"""The layout fits a world or says how many ranks it needs."""

import pytest

from megatron_step.config.parallel import ParallelConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor_parallel_size": 0}, "must be at least 1"),
        ({"virtual_pipeline_size": 2}, "needs parallel.pipeline_parallel_size above 1"),
        ({"sequence_parallel": True}, "needs parallel.tensor_parallel_size above 1"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**fields)


def test_the_rest_of_the_world_is_data_parallel() -> None:
    layout = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=3)
    assert layout.model_parallel_size == 6
    assert layout.data_parallel_size(24) == 4
    with pytest.raises(ValueError, match="8 ranks does not fit .*start a multiple of 6 ranks, such as 6 or 12"):
        layout.data_parallel_size(8)
