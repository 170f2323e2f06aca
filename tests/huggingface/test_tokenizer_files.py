"""AutoTokenizer loads the written files and gives our ids, beside a config.json of any model type."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hf_checkpoints import word_tokenizer
from transformers import AutoTokenizer

from megatron_step.config.data import DataConfig
from megatron_step.data.tokenizer import load_tokenizer
from megatron_step.huggingface import tokenizer_files
from megatron_step.huggingface.tokenizer_files import check_exportable, copy_tokenizer, write_tokenizer

TEXT = "Emma Woodhouse,  handsome\n\nand clever: 12 é 🎉"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def chat_folder(tmp_path: Path, small_data: DataConfig) -> Path:
    """A SentencePiece model with added tokens and a chat template beside it, as instruct models have them."""
    folder = tmp_path / "chat"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(Path(small_data.tokenizer).read_bytes())
    size = load_tokenizer(small_data.tokenizer).vocab_size
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False) | {"special": True}
    added = {str(size + i): {"content": token, **flags} for i, token in enumerate(("<|im_start|>", "<|im_end|>"))}
    settings = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>", "pad_token": "<unk>", "legacy": False}
    write(folder / "tokenizer_config.json", **settings, added_tokens_decoder=added, add_prefix_space=False)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write(file: Path, **content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def model_folder(path: Path, model_type: str) -> Path:
    path.mkdir()
    write(path / "config.json", model_type=model_type)
    return path


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_sentencepiece_model(tmp_path: Path, small_data: DataConfig, model_type: str) -> None:
    ours = load_tokenizer(small_data.tokenizer)
    out = model_folder(tmp_path / "out", model_type)
    write_tokenizer(ours, 64, out)
    for trusts_code in (False, True):
        theirs = AutoTokenizer.from_pretrained(out, trust_remote_code=trusts_code)
        assert theirs(TEXT)["input_ids"] == ours.encode(TEXT)
        assert theirs.decode(ours.encode(TEXT)) == TEXT
        assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (ours.eod_id, ours.bos_id, ours.vocab_size)
        assert theirs.model_max_length == 64
    assert (out / "tokenizer.model").read_bytes() == Path(small_data.tokenizer).read_bytes()
    assert (out / "tokenizer_of_file.py").exists() == (model_type == "qwen2")


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_added_tokens_and_the_chat_template_are_kept(tmp_path: Path, chat_folder: Path, model_type: str) -> None:
    copy_tokenizer(load_tokenizer(chat_folder), tmp_path / "copy")
    ours = load_tokenizer(tmp_path / "copy")
    assert ours.fingerprint == load_tokenizer(chat_folder).fingerprint
    out = model_folder(tmp_path / "out", model_type)
    write_tokenizer(ours, 64, out)
    before, after = AutoTokenizer.from_pretrained(chat_folder), AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": TEXT}]
    assert after.apply_chat_template(chat, tokenize=False) == f"<|im_start|>user\n{TEXT}<|im_end|>\n"
    for folder in (before, after):
        ids = folder(f"<|im_start|>user\n{TEXT}<|im_end|>\n", add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(f"<|im_start|>user\n{TEXT}<|im_end|>\n")
    assert after.special_tokens_map == before.special_tokens_map
    assert (after.eos_token_id, after.pad_token_id) == (ours.eod_id, before.pad_token_id)
    assert load_tokenizer(out).encode(TEXT) == ours.encode(TEXT)


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    source = word_tokenizer(tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "model.safetensors").write_text("not a tokenizer's")
    ours = load_tokenizer(source)
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(ours, 64, out)
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(out)("it was")["input_ids"] == ours.encode("it was")


def test_dropout_does_not_get_into_an_export(tmp_path: Path, small_data: DataConfig) -> None:
    source = model_folder(tmp_path / "source", "llama")
    write_tokenizer(load_tokenizer(small_data.tokenizer), 64, source)
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["dropout"] = 0.5
    write(source / "tokenizer.json", **content)
    out = model_folder(tmp_path / "out", "llama")
    ours = load_tokenizer(source)
    write_tokenizer(ours, 64, out)
    assert json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))["model"]["dropout"] is None
    assert load_tokenizer(out).fingerprint == ours.fingerprint


def test_a_copy_is_the_same_tokenizer(tmp_path: Path, small_data: DataConfig) -> None:
    for index, path in enumerate((small_data.tokenizer, word_tokenizer(tmp_path / "source"))):
        ours = load_tokenizer(path)
        copy_tokenizer(ours, tmp_path / str(index))
        assert load_tokenizer(tmp_path / str(index)).fingerprint == ours.fingerprint


def test_what_autotokenizer_does_not_load_as_it_is_is_refused(tmp_path: Path, small_data: DataConfig) -> None:
    ours = load_tokenizer(small_data.tokenizer)
    other = AutoTokenizer.from_pretrained(word_tokenizer(tmp_path / "other"))
    check_exportable(ours, {"model_type": "qwen2"})
    with (
        patch.object(tokenizer_files, "load_in_transformers", lambda folder: other),
        pytest.raises(ValueError, match="TokenizersBackend gives other ids for .* PreTrainedTokenizerFast"),
    ):
        check_exportable(ours, {"model_type": "llama"})
