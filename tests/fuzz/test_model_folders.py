"""No Hugging Face folder of a model or a tokenizer ends in a traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import check_survives, damaged_bytes, damaged_tree, examples
from hf_checkpoints import word_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from megatron_step.data.hf_tokenizer import HuggingFaceTokenizer
from megatron_step.huggingface.hf_folder import open_folder
from megatron_step.huggingface.kept_settings import kept_settings

_JSON = ("config.json", "generation_config.json", "model.safetensors.index.json")
_TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_PLACES = ["../other.safetensors", "/etc/passwd", "..", "", "a\0b", "sub/x", *_SHARDS, "config.json"]
_SETTINGS: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Any:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in two shards, and a tokenizer in all the files that AutoTokenizer follows."""
    folder = tmp_path_factory.mktemp("whole")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=16, vocab_size=16))
    model.save_pretrained(folder, max_shard_size="2KB")
    assert sorted(path.name for path in folder.glob("*.safetensors")) == list(_SHARDS)
    word_tokenizer(folder)
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}, "unk_token": "<unk>"}')
    (folder / "added_tokens.json").write_text('{"<one>": 7, "<two>": 8}')
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\ntext\n")
    return folder


@pytest.fixture(scope="module")
def copy(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(whole, tmp_path_factory.mktemp("copies") / "copy"))


def _read_model(folder: Path) -> Any:
    """All that an import reads of a model's folder."""
    opened = check_survives(lambda: open_folder(folder, None))
    if opened is not None:
        for weight in opened.weights:
            check_survives(lambda: weight.join(opened.tensors))  # noqa: B023
        check_survives(lambda: kept_settings(folder))
    return opened


def _check(whole: Path, copy: Path, name: str, content: bytes, read: Callable[[Path], Any]) -> Any:
    """Read the folder with another content of one file, which is put back."""
    (copy / name).write_bytes(content)
    try:
        return read(copy)
    finally:
        shutil.copyfile(whole / name, copy / name)


def _tree(whole: Path, name: str) -> Any:
    return json.loads((whole / name).read_text())


def _bytes(tree: Any) -> bytes:
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def test_the_whole_folder_is_read(whole: Path) -> None:
    assert _read_model(whole) is not None
    assert HuggingFaceTokenizer(whole).vocab_size == 9


@settings(max_examples=examples(80), **_SETTINGS)
@given(data=st.data())
def test_values_of_a_model_folder(whole: Path, copy: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(_JSON))
    tree = data.draw(damaged_tree(_tree(whole, name)))
    _check(whole, copy, name, _bytes(tree), _read_model)


@settings(max_examples=examples(40), **_SETTINGS)
@given(data=st.data())
def test_places_of_an_index(whole: Path, copy: Path, data: st.DataObject) -> None:
    index = _tree(whole, _JSON[2])
    names = sorted(index["weight_map"])
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        index["weight_map"][name] = data.draw(st.sampled_from(_PLACES))
    opened = _check(whole, copy, _JSON[2], _bytes(index), _read_model)
    assert opened is None or set(index["weight_map"].values()) <= set(_SHARDS)


@settings(max_examples=examples(60), **_SETTINGS)
@given(data=st.data())
def test_files_of_a_model_folder_cut_patched_and_swapped(whole: Path, copy: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*_JSON, *_SHARDS, "README.md"]))
    others = [(whole / other).read_bytes() for other in (*_JSON, *_SHARDS)]
    content = data.draw(damaged_bytes((whole / name).read_bytes(), others))
    _check(whole, copy, name, content, _read_model)


@settings(max_examples=examples(40), **_SETTINGS)
@given(data=st.data())
def test_values_of_a_tokenizer_folder(whole: Path, copy: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(_TOKENIZER_JSON))
    tree = data.draw(damaged_tree(_tree(whole, name)))
    _check(whole, copy, name, _bytes(tree), lambda folder: check_survives(lambda: HuggingFaceTokenizer(folder)))


@settings(max_examples=examples(25), **_SETTINGS)
@given(data=st.data())
def test_files_of_a_tokenizer_folder_cut_patched_and_swapped(whole: Path, copy: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(_TOKENIZER_JSON))
    others = [(whole / other).read_bytes() for other in _TOKENIZER_JSON]
    content = data.draw(damaged_bytes((whole / name).read_bytes(), others))
    _check(whole, copy, name, content, lambda folder: check_survives(lambda: HuggingFaceTokenizer(folder)))


@settings(max_examples=examples(30), **_SETTINGS)
@given(data=st.data())
def test_a_key_given_twice_is_refused_in_every_file(whole: Path, copy: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*_JSON, *_TOKENIZER_JSON]))
    tree = _tree(whole, name)
    key = data.draw(st.sampled_from(sorted(tree)))
    text = json.dumps(tree)
    content = f"{{{json.dumps(key)}: {json.dumps(tree[key])}, {text[1:]}".encode()

    def read(folder: Path) -> None:
        with pytest.raises(ValueError, match="twice"):
            HuggingFaceTokenizer(folder) if name in _TOKENIZER_JSON else (
                open_folder(folder, None),
                kept_settings(folder),
            )

    _check(whole, copy, name, content, read)
