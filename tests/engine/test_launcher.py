import pytest

from megatron_step.engine.launcher import speaks, started_by_torchrun


@pytest.mark.parametrize(
    ("environment", "torchrun", "spoken"),
    [
        ({}, False, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False, True),
        ({"TORCHELASTIC_RUN_ID": "none", "RANK": "0"}, True, True),
        ({"TORCHELASTIC_RUN_ID": "none", "RANK": "1"}, True, False),
    ],
)
def test_a_rank_counts_where_torchrun_gave_it(
    environment: dict[str, str], torchrun: bool, spoken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (started_by_torchrun(), speaks()) == (torchrun, spoken)
