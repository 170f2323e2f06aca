"""Every message that docs/faq.md quotes is one that the package prints."""

import ast
import re

import pytest
from small_corpus import REPOSITORY

_PAGE = (REPOSITORY / "docs/faq.md").read_text(encoding="utf-8")
_HEADINGS = re.findall(r"^\*\*(.*?)\*\*", _PAGE, re.MULTILINE)
_QUOTES = [quote for heading in _HEADINGS for quote in re.findall(r"`(.*?)`", heading)]


def _literals() -> list[str]:
    """Return the strings of the package's sources, with adjacent ones joined and NUL in place of values."""
    found = []
    for path in (REPOSITORY / "megatron_step").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "\0" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


_LITERALS = _literals()


@pytest.mark.parametrize("quote", _QUOTES)
def test_a_quoted_message_is_printed(quote: str) -> None:
    assert len(_QUOTES) >= 10
    fixed = [part.strip() for part in quote.split("...") if part.strip()]
    assert any(all(part in literal for part in fixed) for literal in _LITERALS), quote
