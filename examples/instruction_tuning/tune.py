"""Teach the models of two runs to answer questions, and compare them before and after: TRL's SFTTrainer on train.jsonl.

Each run's newest checkpoint is exported, gets a chat template, and is tuned on the answers alone. OUT then holds
exported/ and tuned/ with a folder for each model, and results.json.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FOLDER = Path(__file__).parent
_USER, _ASSISTANT, _PAD = "<|user|>", "<|assistant|>", "<|pad|>"
_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<|user|>{{ message.content }}"
    "{% elif message.role == 'assistant' %}<|assistant|>{{ message.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('a message is from user or assistant, not ' + message.role) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""As in pre-training, the end-of-text token ends a text, here an answer: generation stops there."""
_CHANCE = {"novel": "1 of 6", "person": "1 of 2", "mark": "1 of 3"}
_LONGEST_ANSWER = 16  # tokens; all right answers are shorter


def main() -> int:
    """Exit status: 0, or 2 for bad input."""
    arguments = _parser().parse_args()
    if importlib.util.find_spec("trl") is None:
        print('error: TRL is not installed: pip install -c constraints.txt -e ".[trl]"', file=sys.stderr)
        return 2
    try:
        results = _compare(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{_dialogue(results)}\n\n{_table(results)}\n\nwrote {arguments.output}")
    return 0


def _compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """What each model does before and after, by its name; all of it is in the output folder then, or nothing."""
    from megatron_step.huggingface.new_folder import new_folder
    from megatron_step.huggingface.to_hf import ExportOptions, export_model

    runs = {"vanilla": arguments.vanilla_run, "step": arguments.step_run}
    for run in runs.values():
        if not run.exists():
            raise FileNotFoundError(f"there is no run at {run}: make demo leaves runs/step_vanilla and runs/step")
    results = {}
    with new_folder(arguments.output, needed_bytes=0) as folder:
        for name, run in runs.items():
            export_model(run, folder / "exported" / name, ExportOptions(dtype="float32"))
        for name in runs:
            print(f"tuning {name}", flush=True)
            exported, tuned = folder / "exported" / name, folder / "tuned" / name
            results[name] = tune(exported, tuned, arguments.steps)
            for moment, model in (("before", exported), ("after", tuned)):
                results[name][moment]["perplexity"] = _perplexity(model, arguments.text)
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def tune(exported: Path, tuned: Path, steps: int) -> dict[str, Any]:
    """Tune the model at `exported` by `steps` steps of 16 pairs, write it to `tuned`, and measure it on held-out pairs.

    Raises ValueError if the model's context is too short for a pair.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = with_chat_template(exported)
    train, held_out = (_pairs(name) for name in ("train", "held_out"))
    _check_lengths([*train, *held_out], tokenizer, model.config.max_position_embeddings)
    columns = ("prompt", "completion")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tuned),
            max_steps=steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=len(held_out),  # one batch, so that its loss is the mean over all tokens
            learning_rate=5e-4,
            lr_scheduler_type="linear",
            warmup_steps=max(1, steps // 20),
            max_length=model.config.max_position_embeddings,
            completion_only_loss=True,
            gradient_checkpointing=False,  # the model is small
            dataloader_pin_memory=False,
            disable_tqdm=not sys.stderr.isatty(),
            bf16=False,
            save_strategy="no",
            report_to="none",
            logging_steps=max(1, steps // 10),
            seed=1,
        ),
        train_dataset=Dataset.from_list([{key: pair[key] for key in columns} for pair in train]),
        eval_dataset=Dataset.from_list([{key: pair[key] for key in columns} for pair in held_out]),
        processing_class=tokenizer,
    )
    untuned_scores = {"loss": trainer.evaluate()["eval_loss"], **_exact_matches(model, tokenizer, held_out)}
    trainer.train()
    tuned_scores = {"loss": trainer.evaluate()["eval_loss"], **_exact_matches(model, tokenizer, held_out)}
    trainer.save_model(str(tuned))  # with the tokenizer and its template
    (tuned / "training_args.bin").unlink()  # pickled
    return {"before": untuned_scores, "after": tuned_scores}


def with_chat_template(folder: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model and the tokenizer of a folder, with a token for each side of a dialogue and one to fill batches.

    The new tokens' embeddings are drawn around the mean of all others, as transformers does.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer.add_special_tokens({"pad_token": _PAD, "additional_special_tokens": [_USER, _ASSISTANT]})
    tokenizer.chat_template = _TEMPLATE
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def answers(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", questions: Sequence[list[dict]]
) -> list[str]:
    """The likeliest answer to each dialogue, token by token."""
    tokenizer.padding_side = "left"  # all questions end where the answers begin
    batch = tokenizer.apply_chat_template(
        questions, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    model.eval()
    ids = model.generate(**batch, do_sample=False, max_new_tokens=_LONGEST_ANSWER, max_length=None)  # [b, s]
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _exact_matches(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", pairs: list[dict]) -> dict[str, Any]:
    """The share of right answers of each kind, and the first answer of each."""
    given = [text.strip() for text in answers(model, tokenizer, [pair["prompt"] for pair in pairs])]
    shares, first = {}, {}
    for kind in _CHANCE:
        own = [(pair, answer) for pair, answer in zip(pairs, given) if pair["kind"] == kind]
        shares[kind] = sum(answer == pair["completion"][0]["content"] for pair, answer in own) / len(own)
        first[own[0][0]["prompt"][0]["content"]] = own[0][1]
    return {"exact_match": {**shares, "all": sum(shares.values()) / len(shares)}, "answers": first}


def _pairs(name: str) -> list[dict]:
    return [json.loads(line) for line in (_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _check_lengths(pairs: list[dict], tokenizer: "PreTrainedTokenizerBase", context: int) -> None:
    dialogues = [pair["prompt"] + pair["completion"] for pair in pairs]
    longest = max(map(len, tokenizer.apply_chat_template(dialogues, return_dict=False)))
    if longest > context:
        raise ValueError(f"the longest pair has {longest} tokens, and the model's context {context}: take a longer one")


def _perplexity(folder: Path, text: Path) -> float:
    """What `tools/evaluate.py FOLDER --text TEXT` says."""
    from megatron_step.evaluation.models import open_model
    from megatron_step.evaluation.perplexity import text_loss
    from megatron_step.evaluation.text import text_of_files

    with open_model(folder) as model:
        return text_loss(model, text_of_files([text], model.tokenizer)).perplexity


def _table(results: dict[str, Any]) -> str:
    """Each measure before and after, a column for each model, in Markdown."""

    def row(label: str, form: str, *keys: str) -> str:
        cells = []
        for result in results.values():
            values = [result["before"], result["after"]]
            for key in keys:
                values = [value[key] for value in values]
            cells.append(" → ".join(format(value, form) for value in values))
        return f"| {label} | {' | '.join(cells)} |"

    kinds = [
        row(f"exact match, {kind} (chance {chance})", ".1%", "exact_match", kind) for kind, chance in _CHANCE.items()
    ]
    rows = [
        row("loss on held-out answers", ".3f", "loss"),
        row("exact match, all", ".1%", "exact_match", "all"),
        *kinds,
        row("perplexity on plain text", ".1f", "perplexity"),
    ]
    return "\n".join([f"| before → after | {' | '.join(results)} |", "|---|" + "---|" * len(results), *rows])


def _dialogue(results: dict[str, Any]) -> str:
    """The first held-out question of each kind, and what the tuned models say."""
    questions = next(iter(results.values()))["after"]["answers"]
    lines = []
    for question in questions:
        lines += [
            f"user: {question}",
            *(f"{name}: {result['after']['answers'][question]}" for name, result in results.items()),
        ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vanilla_run", type=Path, metavar="VANILLA_RUN", help="a run's output folder, or a checkpoint")
    parser.add_argument("step_run", type=Path, metavar="STEP_RUN", help="that of the run to compare it with")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="a new folder")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="plain text to measure perplexity on")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of 16 pairs (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
