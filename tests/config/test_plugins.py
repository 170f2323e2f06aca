"""A config's plugins are imported, and what is wrong with them is one line."""

from pathlib import Path

import pytest
from small_run import small_config

from megatron_step.config.load import config_from_text, config_text, load_config
from megatron_step.config.plugins import import_plugins, plugin_list


def _module(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.py").write_text(text)
    return name


def test_lists_of_all_plugins_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    names = [
        _module(tmp_path, "plugin_with_hooks", "def a(context): ...\ndef b(context): ...\nhooks = [a, b]\n"),
        _module(tmp_path, "plugin_with_nothing", ""),
        _module(tmp_path, "plugin_with_tracker", "class T: ...\ntrackers = (T,)\n"),
    ]
    plugins = import_plugins(names)
    assert [hook.__name__ for hook in plugin_list(plugins, "hooks")] == ["a", "b"]
    assert [tracker.__name__ for tracker in plugin_list(plugins, "trackers")] == ["T"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            None,
            "there is no module faulty_plugin_0: start the command in the module's folder, or add its folder to "
            "PYTHONPATH",
        ),
        (
            "import not_there_at_all",
            "the module faulty_plugin_1 needs not_there_at_all, which is not installed: install not_there_at_all",
        ),
        ("1 / 0", "the module faulty_plugin_2 cannot be imported: ZeroDivisionError: division by zero"),
        ("hooks = 3", "faulty_plugin_3.hooks is not a list of functions: make it one"),
        ("hooks = ['print']", "faulty_plugin_4.hooks is not a list of functions: make it one"),
    ],
)
def test_what_is_wrong_is_one_line(
    text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = message[message.index("faulty_plugin_") :][:15]
    if text is not None:
        _module(tmp_path, name, text)
    with pytest.raises(ValueError, match="plugins: ") as caught:
        plugin_list(import_plugins([name]), "hooks")
    assert str(caught.value) == f"plugins: {message}"


def test_a_config_names_its_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    _module(tmp_path, "counted_plugin", "import sys\nsys.counted = getattr(sys, 'counted', 0) + 1\n")
    path = tmp_path / "config.yaml"
    path.write_text(config_text(small_config()))
    config = load_config(["--config", str(path), "--plugins", "[counted_plugin]"])
    assert config.plugins == ["counted_plugin"]
    assert config_from_text(config_text(config)) == config
    import sys

    assert sys.counted == 1  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="there is no module nowhere"):
        load_config(["--config", str(path), "--plugins", "[nowhere]"])
