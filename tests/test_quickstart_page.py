"""The commands of docs/quickstart.md lead from a text to a model in transformers, with fewer steps."""

import re
import shlex
from pathlib import Path

import pytest
from small_corpus import REPOSITORY

from megatron_step.cli.main import main

_CHARACTERS = 200_000  # as little text as the page asks for


def test_the_commands_work_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (REPOSITORY / "docs" / "quickstart.md").read_text(encoding="utf-8")
    text = (REPOSITORY / "examples/data/austen.txt").read_text(encoding="utf-8")[:_CHARACTERS]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks[1:] for line in block.splitlines()]
    assert len(lines) == 10
    for line in lines:
        command, *arguments = shlex.split(line.replace("--steps 150", "--steps 5"))
        if command == "cd":
            monkeypatch.chdir(arguments[0])
        else:
            assert command == "megatron-step"
            assert main(arguments) == 0, line
    assert Path("report.png").is_file()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    exec(compile(block, "docs/quickstart.md", "exec"), {})
