"""The progress bar follows the units done; a hidden one prints nothing."""

import io
from typing import Any
from unittest.mock import patch

import pytest
from tqdm import tqdm

from megatron_step.cli import progress_bar
from megatron_step.cli.progress_bar import progress_bar as opened_bar


def test_a_hidden_bar_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with opened_bar("B", is_hidden=True) as show:
        show(1, 2)
    assert capsys.readouterr() == ("", "")


def test_each_call_sets_the_bar_to_the_units_done() -> None:
    bars: list[Any] = []

    def shown(**settings: Any) -> Any:
        assert settings.pop("disable") is None, "tqdm hides the bar where there is no terminal"
        bars.append(tqdm(**settings, file=io.StringIO()))
        return bars[-1]

    with patch.object(progress_bar, "tqdm", shown), opened_bar("window") as show:
        show(3, 10)
        show(7, 10)
    assert (bars[0].n, bars[0].total) == (7, 10)
