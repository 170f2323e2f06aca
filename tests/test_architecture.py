"""Rules about the source tree: which file may import which, what has a test, how long things are, which words stand."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "megatron_step"
PACKAGES = ("megatron_step", "benchmarks")
COMPAT = PACKAGE / "engine/compat"

# A file may import from its own package and from those before it.
ORDER = [
    "config",
    "plan",
    "planner",
    "engine",
    "report",
    "compare",
    "ops",
    "layers",
    "model",
    "adapters",
    "data",
    "optim",
    "checkpoint",
    "growth",
    "training",
    "huggingface",
    "evaluation",
    "cli",
]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
SOURCE_FOLDERS = ["megatron_step", "benchmarks", "tools", "tests", "csrc"]
# Words that have another name here, or speak of how the code came about rather than of what it does.
BANNED = re.compile(
    r"\b(TODO|FIXME|XXX|HACK|NotImplementedError|n_layers?|n_heads?|d_model|batch_size_per_gpu|iterations?)\b"
    r"|\b(issue|session|helper) #?\d+\b"
    r"|(?<![\w.])/(work|tmp)/"
)

NO_NOUN = re.compile(r"(of|at|before|after|below|above|under|within|without|beyond|beside|here|there|to|by|on)|of_\w+")
"""Names that say where a thing stands, not what it is."""

# Phrases that readers stumble over, and what to write instead.
PHRASES = {
    r"\banew\b": "again",
    r"\balike\b": "equal, the same",
    r"\b(has|have|had) not (the|a|an)\b": "lacks, has no",
    r"\bsuch of\b": "those that",
    r"\bof them alone\b": "only these",
    r"\b(this product|the product's)\b": "megatron_step",
    r"\bwhat stands\b|\bstands? behind\b": "the noun for it",
    r"\bof (its|their) own\b(?! (weight|rank))": "its own, separate",
    r"\bin the air\b": "in progress",
    r"\b(it|so) is had\b|\bis had\b": "takes, is",
    r"\bas it stands\b": "unchanged",
    r"\b(so|and so) it is\b": "the fact itself",
    r"\bis (not )?to be said\b|\bwhat is said\b": "messages",
    r"\bsays it has\b": "names",
    r"\bno news\b": "say what is known",
    r"\bwithout a word\b": "silently",
    r"\b(a|one) a (step|line|rank|layer|token)\b": "per",
}
# A docstring begins with a verb in the imperative or with a noun, and never with these words.
NO_FIRST_WORDS = {"Of", "That", "As", "Alike", "Such", "Those"}


def _python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


def _name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def _module(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> Iterator[str]:
    """Modules of this repository that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PACKAGES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)}:{node.lineno}: relative import"
            if node.module and node.module.split(".")[0] in PACKAGES:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    yield whole if _is_module(whole) else node.module


def _is_module(name: str) -> bool:
    path = REPOSITORY / Path(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


@pytest.mark.parametrize("path", _python_files("megatron_step"), ids=_name)
def test_a_file_imports_only_from_packages_above_its_own(path: Path) -> None:
    parts = path.relative_to(PACKAGE).parts
    if len(parts) == 1:
        return  # __init__.py, __main__.py, api.py and train.py, which stand outside the order
    assert parts[0] in ORDER, f"{parts[0]} has no place in the order of packages"
    allowed = ORDER[: ORDER.index(parts[0]) + 1]
    if parts[0] == "cli":
        allowed += ["train", "api"]  # what torchrun starts, and what Python gets
    below = [name for name in _imports(path) if [*name.split("."), ""][1] not in allowed]
    assert not below, f"{_name(path)} imports {below}"


@pytest.mark.parametrize("path", _python_files("megatron_step", "benchmarks", "tools"), ids=_name)
def test_private_names_of_others_are_touched_in_compat_alone(path: Path) -> None:
    if path.is_relative_to(COMPAT):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = set(_defined_names(tree))
    touched = [
        ast.unparse(node)
        for node in ast.walk(tree)
        for name in _names_of_others(node)
        if name != "_exit"  # of os: public, in spite of its name
        and any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
        and not (isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls") and name in own)
    ]
    assert not touched, f"{_name(path)} touches private names, which is for engine/compat alone: {touched}"


def _names_of_others(node: ast.AST) -> list[str]:
    """Names that a node takes from another object or module, directly or by a string."""
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or "", *(alias.name for alias in node.names)]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
        ("getattr", "hasattr", "setattr", "patch.object")
    ):
        return [name.value for name in node.args[1:2] if isinstance(name, ast.Constant) and isinstance(name.value, str)]
    return []


def _defined_names(tree: ast.AST) -> Iterator[str]:
    """Functions, variables and attributes that a file defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


@pytest.mark.parametrize("path", _python_files("megatron_step"), ids=_name)
def test_no_class_overrides_a_private_name_of_a_library(path: Path) -> None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef) or not node.bases:
            continue
        private = {name for name in _defined_names(node) if name.startswith("_") and not name.startswith("__")}
        if not private:
            continue
        made = getattr(importlib.import_module(_module(path)), node.name)
        libraries = [base for base in made.__mro__ if base.__module__.split(".")[0] not in PACKAGES]
        overridden = [f"{base.__name__}.{name}" for base in libraries for name in private if name in vars(base)]
        assert not overridden, f"{_name(path)}: {node.name} overrides {overridden}; engine/compat is the place for it"


def test_no_module_imports_itself_through_others() -> None:
    graph = {_module(path): set(_imports(path)) for path in _python_files("megatron_step", "benchmarks")}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import cycle: {' -> '.join([*trail[trail.index(module) :], module])}"
        if module in done:
            return
        for imported in graph.get(module, ()):
            visit(imported, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    ("packages", "heavy"),
    [
        (("config", "plan"), {"torch", "megatron.core", "transformers", "numpy", "mip"}),
        (("planner", "report"), {"torch", "megatron.core", "transformers"}),
    ],
)
def test_plans_work_without_torch(packages: tuple[str, ...], heavy: set[str]) -> None:
    modules = [_module(path) for path in _python_files(*(f"megatron_step/{package}" for package in packages))]
    program = (
        f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"heavy = {heavy!r} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


# tests/tools/test_wrappers.py tests the tools that only start a command.
_TESTED_FILES = [path for path in _python_files("megatron_step", "benchmarks") if path.name != "__init__.py"]


@pytest.mark.parametrize("path", _TESTED_FILES, ids=_name)
def test_a_source_file_has_a_test_file(path: Path) -> None:
    root = PACKAGE if path.is_relative_to(PACKAGE) else REPOSITORY
    test = REPOSITORY / "tests" / path.relative_to(root).with_name(f"test_{path.name}")
    assert test.is_file(), f"{_name(path)} has no {_name(test)}"


@pytest.mark.parametrize("path", [p for p in sorted((REPOSITORY / "csrc").iterdir()) if p.is_file()], ids=_name)
def test_files_of_kernels_are_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_FILE_LINES, f"{_name(path)} has {lines} lines: split it by subject"


@pytest.mark.parametrize("path", [*_python_files(*SOURCE_FOLDERS), REPOSITORY / "setup.py"], ids=_name)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES, f"{_name(path)} holds more than one idea: split it by subject"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{_name(path)}:{node.lineno}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", _python_files("megatron_step", "benchmarks", "tools"), ids=_name)
def test_public_names_have_a_docstring(path: Path) -> None:
    if path == PACKAGE / "ops/fakes.py":
        return  # one-line shapes, under the names of the operations that they stand for
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or path.stat().st_size == 0, f"{_name(path)} does not say what it is for"
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not (node.name == "main" and path.parent.name == "tools")
        and "overload" not in [ast.unparse(decorator) for decorator in node.decorator_list]
        and not ast.get_docstring(node)
    ]
    assert not bare, f"{_name(path)}: {bare} have no docstring"


@pytest.mark.parametrize("path", _python_files("tests"), ids=_name)
def test_a_test_can_fail(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            checks = [
                inner
                for inner in ast.walk(node)
                if isinstance(inner, ast.Assert)
                or (
                    isinstance(inner, ast.Call)
                    and re.search(r"assert|raises|check|expect|run|spawn", ast.unparse(inner.func))
                )
            ]
            assert checks, f"{_name(path)}:{node.lineno}: {node.name} checks nothing"


@pytest.mark.parametrize("path", _python_files("megatron_step", "tools"), ids=_name)
def test_messages_number_stages_from_one(path: Path) -> None:
    """An index counts from 0: what a person reads says `stage.number`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        parts = node.values if isinstance(node, ast.JoinedStr) else []
        for before, value in pairwise(parts):
            is_named = isinstance(before, ast.Constant) and re.search(r"\bstage $", str(before.value))
            if is_named and isinstance(value, ast.FormattedValue):
                shown = ast.unparse(value.value)
                assert "number" in shown, f"{_name(path)}:{node.lineno}: stage {{{shown}}}"


@pytest.mark.parametrize("path", _python_files("megatron_step", "benchmarks", "tools", "examples"), ids=_name)
def test_names_are_nouns(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        named = {ast.Name: "id", ast.arg: "arg"}.get(type(node), "")
        name = "" if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) else getattr(node, named, "")
        number = getattr(node, "lineno", 0)
        assert not NO_NOUN.fullmatch(name), f"{_name(path)}:{number}: {name}: name it by a noun"


def _written_files() -> list[Path]:
    code = [path for folder in SOURCE_FOLDERS for path in (REPOSITORY / folder).rglob("*") if path.is_file()]
    prose = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"), *(REPOSITORY / "examples").rglob("*.md")]
    kinds = {".py", ".cpp", ".h", ".cu", ".cuh", ".md"}
    return sorted(path for path in [*code, *prose] if path.suffix in kinds and path != Path(__file__))


@pytest.mark.parametrize("path", _written_files(), ids=_name)
def test_words(path: Path) -> None:
    if path.name == "CONTRIBUTING.md":
        return  # the table of words names those that are not used
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        found = BANNED.search(line)
        assert found is None, f"{_name(path)}:{number}: {found.group() if found else ''}"


@pytest.mark.parametrize("path", _written_files(), ids=_name)
def test_sentences_are_plain(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        for phrase, instead in PHRASES.items():
            found = re.search(phrase, line)
            assert not found, f"{_name(path)}:{number}: {found.group() if found else ''}: write {instead}"


@pytest.mark.parametrize("path", _python_files(*SOURCE_FOLDERS), ids=_name)
def test_docstrings_begin_with_a_verb_or_a_noun(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            first = (node.value.value.split() or [""])[0]
            assert first not in NO_FIRST_WORDS, f"{_name(path)}:{node.lineno}: a docstring that begins with {first}"


def test_the_tree_names_every_file() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    shown = ("megatron_step/", "benchmarks/", "csrc/", "tools/", "docs/")
    files = {
        name
        for name in listed.stdout.splitlines()
        if name.startswith(shown) and not name.endswith("__init__.py") and (REPOSITORY / name).is_file()
    }
    tree = _tree()
    assert not files - tree, f"not in the tree of docs/architecture.md: {sorted(files - tree)}"
    assert not tree - files, f"in the tree of docs/architecture.md, but not there: {sorted(tree - files)}"


def _tree() -> set[str]:
    """Return the paths of the files that docs/architecture.md lists: two spaces a level."""
    text = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    tree = re.search(r"```text\n(megatron_step/.*?)```", text, re.DOTALL)
    assert tree, "docs/architecture.md has no tree"
    folders: list[str] = []
    files = set()
    for line in tree.group(1).splitlines():
        entry = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], entry]
        path = "".join(folders)
        if not entry.endswith("/") and depth > 0:
            files.add(path)
    return files
