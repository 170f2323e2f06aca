"""A folder gives the ids of transformers' AutoTokenizer, whichever of its files decides them, and always the same."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from megatron_step.data.hf_tokenizer import HuggingFaceTokenizer
from megatron_step.data.tokenizer import load_tokenizer

FLAGS = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False) | {"special": True}
TEXT = "<|im_start|>It was  a\n\n fine  <|im_end|> morning.<|im_end|>"


@pytest.fixture
def folder(tmp_path: Path, text: str) -> Path:
    """tokenizer.json of a byte-level BPE, which would add <s>, cut and pad."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text, "it was a fine morning " * 9], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.enable_truncation(max_length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>")
    return tmp_path


def write(file: Path, **content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def change(file: Path, **content: Any) -> None:
    write(file, **{**json.loads(file.read_text(encoding="utf-8")), **content})


def their_ids(folder: Path, text: str) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("flag", [None, "lstrip", "rstrip", "normalized", "single_word"])
def test_added_tokens_beside_tokenizer_json(folder: Path, flag: str | None) -> None:
    before = load_tokenizer(folder).fingerprint
    flags = FLAGS if flag is None else {**FLAGS, flag: True}
    added = {str(index): {"content": token, **flags} for index, token in ((400, "<|im_start|>"), (401, "<|im_end|>"))}
    change(folder / "tokenizer_config.json", added_tokens_decoder=added, eos_token="<|im_end|>")
    ours = load_tokenizer(folder)
    assert ours.encode(TEXT) == ours.encode_batch([TEXT])[0] == their_ids(folder, TEXT)
    assert 401 in ours.encode(TEXT)
    assert (ours.eod_id, ours.vocab_size, ours.token(401)) == (401, 402, "<|im_end|>")
    assert ours.fingerprint != before
    assert load_tokenizer(folder, "</s>").eod_id == 1


@pytest.mark.parametrize("file", ["tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"])
def test_added_tokens_beside_a_sentencepiece_model(tmp_path: Path, tokenizer_path: str, file: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(Path(tokenizer_path).read_bytes())
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": False}
    added = {"500": {"content": "<|im_start|>", **FLAGS}, "501": {"content": "<|im_end|>", **FLAGS}}
    contents = {
        "tokenizer_config.json": {"added_tokens_decoder": added, "eos_token": "<|im_end|>"},
        "added_tokens.json": {"<|im_start|>": 500, "<|im_end|>": 501},
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]},
    }
    write(tmp_path / file, **contents[file])
    if file == "tokenizer_config.json":
        change(tmp_path / file, **settings)
    else:
        write(tmp_path / "tokenizer_config.json", **settings)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert ours.encode(TEXT) == their_ids(tmp_path, TEXT)
    assert (ours.eod_id, ours.vocab_size) == (theirs.eos_token_id, len(theirs))
    assert ours.fingerprint != load_tokenizer(tokenizer_path).fingerprint


def test_a_model_and_a_config_that_adds_nothing_are_the_model(tmp_path: Path, tokenizer_path: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(Path(tokenizer_path).read_bytes())
    model = load_tokenizer(tokenizer_path)
    assert load_tokenizer(tmp_path).fingerprint == model.fingerprint
    write(tmp_path / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", add_prefix_space=False)
    ours = load_tokenizer(tmp_path)
    assert ours.encode(TEXT + "</s>") == their_ids(tmp_path, TEXT + "</s>")
    same = ours.encode_batch(["kalo  min\n\n"]) == model.encode_batch(["kalo  min\n\n"])
    assert (ours.fingerprint == model.fingerprint) == same


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", "LlamaTokenizerFast"])
@pytest.mark.parametrize("model_type", [None, "qwen2", "llama", "mistral"])
def test_what_the_class_and_the_model_type_make_of_a_file(folder: Path, kind: str, model_type: str | None) -> None:
    plain = load_tokenizer(folder)
    change(folder / "tokenizer_config.json", tokenizer_class=kind)
    if model_type is not None:
        write(folder / "config.json", model_type=model_type)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in (TEXT, "12345  x\n\n y", "don't é e\u0301"):
        assert ours.encode(text) == their_ids(folder, text)
    assert (ours.eod_id, ours.vocab_size) == (theirs.eos_token_id, len(theirs))
    texts = [TEXT, "12345  x\n\n y", " a\n  b", "don't é e\u0301"]
    if ours.encode_batch(texts) != plain.encode_batch(texts):
        assert ours.fingerprint != plain.fingerprint


def test_no_dropout_and_no_sampling(folder: Path, text: str) -> None:
    plain = load_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["dropout"] = 0.5
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    dropped = load_tokenizer(folder)
    assert dropped.encode(text) == dropped.encode_batch([text])[0] == plain.encode(text)
    pieces = [("<unk>", 0.0), ("</s>", -9.0), *((letter, -3.0) for letter in "abcdefgh"), ("ab", -5.9), ("cd", -5.9)]
    unigram = json.loads(tokenizers.Tokenizer(models.Unigram(pieces, 0)).to_str())
    ids = []
    for sampling in ({}, {"alpha": 0.1, "nbest_size": 9}):
        unigram["model"].update(sampling)
        (folder / "tokenizer.json").write_text(json.dumps(unigram), encoding="utf-8")
        ids.append(load_tokenizer(folder).encode("abcd" * 50))
    assert ids[0] == ids[1]


def test_a_copy_for_another_process_gives_the_same_ids(folder: Path) -> None:
    change(folder / "tokenizer_config.json", split_special_tokens=True)
    ours = load_tokenizer(folder)
    assert isinstance(ours, HuggingFaceTokenizer)
    copy = pickle.loads(pickle.dumps(ours))
    assert copy.encode("a</s>b") == ours.encode("a</s>b") == their_ids(folder, "a</s>b")
    assert 1 not in ours.encode("a</s>b")


@pytest.mark.parametrize(
    "settings",
    [{"added_tokens_decoder": {"x": 1}}, {"eos_token": 5}, {"tokenizer_class": 7}, {"model_max_length": "x"}],
)
def test_settings_of_another_kind_are_one_line_or_do_not_matter(folder: Path, settings: dict[str, Any]) -> None:
    change(folder / "tokenizer_config.json", **settings)
    try:
        load_tokenizer(folder)
    except ValueError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
