"""Tokenizers made like those of known models keep their ids, their first token and a chat in an export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_corpus import REPOSITORY
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from megatron_step.data.tokenizer import load_tokenizer
from megatron_step.huggingface.tokenizer_files import write_tokenizer

TEXT = "It was  a fine morning, 12345 times;\n\n\tdef f(x): return x+1  # cafe\u0301 Å 🎉 <|end|>\u00a0ok<|start|>"
CORPUS = (REPOSITORY / "examples/data/austen.txt").read_text(encoding="utf-8")[:20_000]
TEMPLATE = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
SPECIAL = ["<unk>", "<|start|>", "<|end|>"]
GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(words: str | None, **of_model: Any) -> Tokenizer:
    """BPE of bytes, in the words of GPT-2 or of a pattern."""
    tokenizer = Tokenizer(models.BPE(**of_model))
    of_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    split = [] if words is None else [pre_tokenizers.Split(Regex(words), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, of_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def gpt2() -> tuple[Tokenizer, dict[str, Any]]:
    return byte_level(None), {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|end|>", "unk_token": "<|end|>"}


def llama3() -> tuple[Tokenizer, dict[str, Any]]:
    """Words of the vocabulary are not merged; a first token."""
    tokenizer = byte_level(GPT4_WORDS, ignore_merges=True)
    first = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 1)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), first])
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|start|>"}


def qwen2() -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = byte_level(GPT4_WORDS.replace("{1,3}", ""))
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer, {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "add_bos_token": False}


def gemma() -> tuple[Tokenizer, dict[str, Any]]:
    """SentencePiece's BPE with bytes, without a space in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 1)])
    return tokenizer, {"tokenizer_class": "GemmaTokenizer", "bos_token": "<|start|>", "unk_token": "<unk>"}


def t5() -> tuple[Tokenizer, dict[str, Any]]:
    """Unigram, with a last token."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 2)])
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}


def trained(tokenizer: Tokenizer, text: str) -> Tokenizer:
    """The tokenizer with a vocabulary of 400 tokens."""
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)] if getattr(tokenizer.model, "byte_fallback", False) else []
    if isinstance(tokenizer.model, models.Unigram):
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    else:
        alphabet = [] if of_bytes else pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=SPECIAL + of_bytes, initial_alphabet=alphabet, show_progress=False
        )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    if of_bytes:  # pieces that stand for bytes are no marks in a text
        content = json.loads(tokenizer.to_str())
        content["added_tokens"] = content["added_tokens"][: len(SPECIAL)]
        return Tokenizer.from_str(json.dumps(content))
    return tokenizer


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", [gpt2, llama3, qwen2, gemma, t5])
def test_ids_first_token_and_chat_are_kept(
    tmp_path: Path, kind: Callable[[], tuple[Tokenizer, dict[str, Any]]], model_type: str
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    tokenizer, settings = kind()
    tokenizer = trained(tokenizer, CORPUS)
    tokenizer.add_special_tokens([AddedToken("<|more|>", special=True)])
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", **settings, "chat_template": TEMPLATE}), encoding="utf-8"
    )
    (out / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    ours = load_tokenizer(source)
    write_tokenizer(ours, 64, out)
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(out)
    assert after(TEXT, add_special_tokens=False)["input_ids"] == ours.encode(TEXT)
    assert after(TEXT)["input_ids"] == before(TEXT)["input_ids"]
    assert after.decode(ours.encode(TEXT)) == before.decode(ours.encode(TEXT))
    chat = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": " Yes. "}]
    ids = [one.apply_chat_template(chat, return_dict=False) for one in (before, after)]
    assert ids[1] == ids[0]
    assert after.special_tokens_map == before.special_tokens_map
    assert len(after) == len(before)
