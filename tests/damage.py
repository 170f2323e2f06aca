"""Inputs as people damage them: values of other types, missing and doubled keys, files cut, patched or swapped."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

_PROFILE_EXAMPLES = 100  # of hypothesis by itself, for which the tests' numbers of examples are made

ODD_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 7, 64, 2**31, 2**64, 10**30])
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(
        ["1e-5", "auto", "null", "~", "~nobody/x", "$UNSET_VARIABLE/x", "a\0b", "\ud800", "true", ".", "/"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
"""Values that no key asks for, and some that keys ask for elsewhere."""


def examples(count: int) -> int:
    """The number of examples of a test: more where the profile asks for more than hypothesis does by itself."""
    return count * max(1, settings.default.max_examples // _PROFILE_EXAMPLES)  # type: ignore[union-attr]


def check_survives(read: Callable[[], Any]) -> Any:
    """Return the result of `read`, or None if it rejects its input with an error of one line, as commands need.

    Raises what is no such error: that would be a traceback.
    """
    try:
        return read()
    except (ValueError, OSError) as error:
        message = str(error)
        assert message.strip(), "an error says something"
        assert "\n" not in message.strip(), f"an error is one line: {message}"
        raw = isinstance(error, (UnicodeError, json.JSONDecodeError))
        assert not raw, f"an error names the file and what to do: {message}"
        return None


@st.composite
def damaged_tree(draw: st.DrawFn, tree: Any) -> Any:
    """A value of dicts and lists with one to three places replaced, left out or put elsewhere."""
    for _ in range(draw(st.integers(1, 3))):
        tree = _damage(draw, tree)
    return tree


def _damage(draw: st.DrawFn, tree: Any) -> Any:
    if isinstance(tree, dict) and tree and draw(st.integers(0, 9)) > 0:
        key = draw(st.sampled_from(sorted(tree, key=str)))
        how = draw(st.sampled_from(["inside", "inside", "inside", "replace", "leave out", "rename"]))
        others = {name: value for name, value in tree.items() if name != key}
        if how == "inside":
            return {**tree, key: _damage(draw, tree[key])}
        if how == "replace":
            return {**tree, key: draw(ODD_VALUES)}
        return others if how == "leave out" else {**others, draw(st.text(max_size=5)): tree[key]}
    if isinstance(tree, list) and tree and draw(st.booleans()):
        index = draw(st.integers(0, len(tree) - 1))
        changed = draw(st.sampled_from([[], [tree[index]] * 2, [_damage(draw, tree[index])]]))
        return [*tree[:index], *changed, *tree[index + 1 :]]
    return draw(ODD_VALUES)


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes, others: Sequence[bytes] = ()) -> bytes:
    """A file's bytes cut, patched, doubled, swapped for another file's, or all of these."""
    for _ in range(draw(st.integers(1, 2))):
        how = draw(st.sampled_from(["cut", "cut", "patch", "patch", "insert", "remove", "double", "swap", "empty"]))
        at = draw(st.integers(0, len(content)))
        if how == "cut":
            content = content[:at]
        elif how == "patch":
            patch = draw(st.binary(min_size=1, max_size=9))
            content = content[:at] + patch + content[at + len(patch) :]
        elif how == "insert":
            content = content[:at] + draw(st.binary(min_size=1, max_size=40)) + content[at:]
        elif how == "remove":
            content = content[:at] + content[at + draw(st.integers(1, 40)) :]
        elif how == "double":
            content += content
        elif how == "swap" and others:
            content = draw(st.sampled_from(list(others)))
        elif how == "empty":
            content = b""
    return content


@st.composite
def doubled_line(draw: st.DrawFn, text: str) -> str:
    """Text with one of its lines twice, the second time anywhere below."""
    lines = text.splitlines(keepends=True)
    first = draw(st.integers(0, len(lines) - 1))
    second = draw(st.integers(first, len(lines)))
    return "".join([*lines[:second], lines[first], *lines[second:]])
