import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megatron_step.data.tokenizer import fitting_tokenizer, load_tokenizer


@pytest.fixture
def folder(tmp_path: Path, text: str) -> Path:
    """A Hugging Face folder that would add <s>, cut and pad if it were asked in the ordinary way."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text], trainer)
    backend.add_special_tokens(["<extra>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", backend.token_to_id("<s>")), ("</s>", backend.token_to_id("</s>"))],
    )
    backend.enable_truncation(max_length=8)
    backend.enable_padding(length=16, pad_id=2, pad_token="<pad>")
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>", "chat_template": "first"}
        )
    )
    return tmp_path


def test_sentencepiece_adds_nothing_and_decodes_to_the_text(tokenizer_path: str, text: str) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_id == 1 and tokenizer.eod_id == 2
    assert not {tokenizer.bos_id, tokenizer.eod_id} & set(ids)
    assert (
        tokenizer.vocab_size == sentencepiece.SentencePieceProcessor(model_file=tokenizer_path).get_piece_size() == 500
    )
    assert tokenizer.encode_batch([text[:50], "", text[50:]]) == [
        tokenizer.encode(text[:50]),
        [],
        tokenizer.encode(text[50:]),
    ]


def test_sentencepiece_reads_control_pieces_in_text_as_text(tokenizer_path: str) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    ids = tokenizer.encode("<s> a </s> <unk> <0x41>")
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == "<s> a </s> <unk> <0x41>"


def test_hugging_face_folder_adds_cuts_and_pads_nothing(folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(text)
    assert len(ids) > 1000 and tokenizer.decode(ids) == text
    assert tokenizer.bos_id == 0 and tokenizer.eod_id == 1
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.encode_batch([text, "a"]) == [ids, tokenizer.encode("a")]


def test_hugging_face_agrees_with_transformers(folder: Path, text: str) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ours = load_tokenizer(folder)
    for sample in (text[:500], " two  spaces\n\n", "a</s>b<extra>"):
        assert ours.encode(sample) == theirs(sample, add_special_tokens=False)["input_ids"]
    assert (ours.eod_id, ours.bos_id) == (theirs.eos_token_id, theirs.bos_token_id)


def test_vocab_size_covers_added_tokens_with_gaps_before_them(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    extra = next(token for token in content["added_tokens"] if token["content"] == "<extra>")
    extra["id"] = 1000
    content["model"]["vocab"]["<extra>"] = 1000
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<extra>") == [1000]
    assert tokenizer.vocab_size == 1001


def test_path_may_be_the_json_file(folder: Path) -> None:
    assert load_tokenizer(folder / "tokenizer.json").fingerprint == load_tokenizer(folder).fingerprint


def test_folder_with_a_sentencepiece_model(tmp_path: Path, tokenizer_path: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(Path(tokenizer_path).read_bytes())
    assert load_tokenizer(tmp_path).fingerprint == load_tokenizer(tokenizer_path).fingerprint


def test_folder_with_vocab_and_merges_only(folder: Path, tmp_path: Path, text: str) -> None:
    new = load_tokenizer(folder)
    old = tmp_path / "old"
    old.mkdir()
    tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).model.save(str(old))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "</s>"}
    (old / "tokenizer_config.json").write_text(json.dumps(config))
    (old / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokenizer = load_tokenizer(old)
    assert tokenizer.encode(text) == new.encode(text)
    assert tokenizer.eod_id == 1


def test_end_of_document_from_the_model_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert load_tokenizer(folder).eod_id == 7


def test_fingerprint_follows_ids_and_not_chat_templates(folder: Path) -> None:
    before = load_tokenizer(folder).fingerprint
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "second"}))
    assert load_tokenizer(folder).fingerprint == before
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<pad>"}))
    assert load_tokenizer(folder).fingerprint != before


def test_no_end_of_document_token(folder: Path) -> None:
    content = (folder / "tokenizer.json").read_text(encoding="utf-8").replace("</s>", "<end>")
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"no token to end a document: set eos_token"):
        load_tokenizer(folder)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the tokenizer .*nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 1000])
def test_damaged_sentencepiece_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "tokenizer.model")


def test_truncated_sentencepiece_model(tmp_path: Path, tokenizer_path: str) -> None:
    (tmp_path / "cut.model").write_bytes(Path(tokenizer_path).read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "cut.model")


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_damaged_tokenizer_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_fits_a_model(folder: Path, tokenizer_path: str) -> None:
    own = load_tokenizer(folder)
    assert fitting_tokenizer(str(folder), own.vocab_size, own.fingerprint).vocab_size == own.vocab_size
    with pytest.raises(ValueError, match=r"401 tokens \(<extra> is 400\), but the model's vocabulary has 400"):
        fitting_tokenizer(str(folder), own.vocab_size - 1, own.fingerprint)
    with pytest.raises(ValueError, match="is not the tokenizer that the model was trained with"):
        fitting_tokenizer(tokenizer_path, 10_000, own.fingerprint)


def test_another_tokenizer_fits_if_it_gives_the_same_ids(folder: Path, tmp_path: Path) -> None:
    own = load_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    saved_again, other = tmp_path / "again", tmp_path / "other"
    for path, merges in ((saved_again, content["model"]["merges"]), (other, content["model"]["merges"][::-1])):
        path.mkdir()
        (path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
        changed = {**content, "model": {**content["model"], "merges": merges}}
        (path / "tokenizer.json").write_text(json.dumps(changed, indent=1), encoding="utf-8")
    fitting = fitting_tokenizer(str(saved_again), own.vocab_size, own.fingerprint, str(folder))
    assert (fitting.path, fitting.fingerprint) == (str(saved_again), own.fingerprint)
    assert load_tokenizer(saved_again).fingerprint != own.fingerprint
    with pytest.raises(ValueError, match=r"is not the tokenizer .*\(the ids of .* differ"):
        fitting_tokenizer(str(other), own.vocab_size, own.fingerprint, str(folder))
    with pytest.raises(ValueError, match="no longer exists to compare"):
        fitting_tokenizer(str(saved_again), own.vocab_size, own.fingerprint, str(tmp_path / "moved"))
    with pytest.raises(ValueError, match="has changed since"):
        fitting_tokenizer(str(saved_again), own.vocab_size, "another", str(folder))
    settings = json.dumps({"eos_token": "<pad>", "bos_token": "<s>"})
    (saved_again / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    with pytest.raises(ValueError, match=r"documents end with <pad> \(2\) instead of </s> \(1\)"):
        fitting_tokenizer(str(saved_again), own.vocab_size, own.fingerprint, str(folder))
