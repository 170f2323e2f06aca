"""AutoTokenizer loads what is written and gives our ids."""

from pathlib import Path

from hf_checkpoints import word_tokenizer
from transformers import AutoTokenizer

from megatron_step.config.data import DataConfig
from megatron_step.data.tokenizer import load_tokenizer
from megatron_step.export.tokenizer_files import copy_tokenizer, write_tokenizer


def test_a_sentencepiece_model(tmp_path: Path, small_data: DataConfig) -> None:
    ours = load_tokenizer(small_data.tokenizer)
    write_tokenizer(ours, 64, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "Emma Woodhouse,  handsome\n\nand clever: 12 é 🎉"
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (ours.eod_id, ours.bos_id, ours.vocab_size)
    assert theirs.model_max_length == 64
    assert (tmp_path / "tokenizer.model").read_bytes() == Path(small_data.tokenizer).read_bytes()


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
    assert AutoTokenizer.from_pretrained(out)("it was")["input_ids"] == ours.encode("it was")


def test_a_copy_is_the_same_tokenizer(tmp_path: Path, small_data: DataConfig) -> None:
    for index, path in enumerate((small_data.tokenizer, word_tokenizer(tmp_path / "source"))):
        ours = load_tokenizer(path)
        copy_tokenizer(ours, tmp_path / str(index))
        assert load_tokenizer(tmp_path / str(index)).fingerprint == ours.fingerprint
