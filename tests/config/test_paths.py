import argparse
import os
from pathlib import Path

import pytest

from megatron_step.config.paths import expand_path, path_argument


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOWHERE", raising=False)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~/runs/x", "/home/me/runs/x"),
        ("~", "/home/me"),
        ("$HOME/x", "/home/me/x"),
        ("${SCRATCH}/x$HOME", "/scratch/me/x/home/me"),
        ("~root/x", f"{os.path.expanduser('~root')}/x"),
        ("a/~/b", "a/~/b"),
        ("./~x", "./~x"),
        ("a b [x] 100% (1)#?*", "a b [x] 100% (1)#?*"),
        ("5$", "5$"),
        ("cost $5", "cost $5"),
        ("data/", "data/"),
        ("", ""),
    ],
)
def test_a_path_is_read_as_a_shell_reads_it(text: str, path: str) -> None:
    assert expand_path(text) == path
    assert path_argument(text) == Path(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$NOWHERE/x", "variable NOWHERE, which is not set"),
        ("a/${NOWHERE}", "variable NOWHERE, which is not set"),
        ("~nobody_of_this_name/x", "the home folder of user nobody_of_this_name"),
        ("a\0b", "a character that no file name can hold"),
    ],
)
def test_what_stands_for_nothing_is_refused(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=message):
        expand_path(text)
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=path_argument)
    with pytest.raises(SystemExit):
        parser.parse_args([text])
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_file_that_exists_under_this_very_name_is_meant(tmp_path: Path) -> None:
    (tmp_path / "$NOWHERE.txt").touch()
    assert expand_path(f"{tmp_path}/$NOWHERE.txt") == f"{tmp_path}/$NOWHERE.txt"
