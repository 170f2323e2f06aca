"""Make train.jsonl and held_out.jsonl from examples/data/austen.txt, always the same: questions about a few lines.

python examples/instruction_tuning/make_pairs.py [FOLDER]      # FOLDER: where to write them, if not beside this file
"""

import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

_FOLDER = Path(__file__).parent
_TEXT = _FOLDER.parent / "data/austen.txt"
_SEPARATOR = "\n\nCHAPTER "
_TITLES = ("EMMA", "MANSFIELD PARK", "NORTHANGER ABBEY", "Persuasion", "PRIDE AND PREJUDICE", "SENSE AND SENSIBILITY")
_MARKS = {".": "full stop", "?": "question mark", "!": "exclamation mark"}
_NUM_TRAIN, _NUM_HELD_OUT = 240, 100  # of each kind
_SENTENCE_ENDS = re.compile(r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.) (?=[A-Z])")
_MEN, _WOMEN = ("Mr.", "Sir", "Captain", "Colonel"), ("Mrs.", "Miss", "Lady")
_SEX = {**dict.fromkeys(_MEN, "man"), **dict.fromkeys(_WOMEN, "woman")}
_PERSON = re.compile(rf"({'|'.join(map(re.escape, _SEX))}) [A-Z][a-z]+")


def main() -> None:
    """Write both files: every kind of question equally often, every answer about as often as the others of its kind."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else _FOLDER
    chapters = _TEXT.read_text(encoding="utf-8").split(_SEPARATOR)
    trained_on = _SEPARATOR.join(chapters[: round(0.95 * len(chapters))])
    sentences = [sentence for _, paragraph in _paragraphs(trained_on) for sentence in _SENTENCE_ENDS.split(paragraph)]
    kinds = {"novel": _novels(trained_on), "person": _persons(sentences), "mark": _marks(sentences)}
    train, held_out = [], []
    for kind, pairs in kinds.items():
        chosen = [_pair(kind, *pair) for pair in _balanced(pairs, _NUM_TRAIN + _NUM_HELD_OUT)]
        train += chosen[:_NUM_TRAIN]
        held_out += chosen[_NUM_TRAIN:]
    for name, pairs in (("train", train), ("held_out", held_out)):
        text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _paragraphs(text: str) -> Iterator[tuple[str, str]]:
    """Each paragraph of more than a line of a title, and the novel that it is from."""
    title = ""
    for paragraph in (" ".join(part.split()) for part in re.split(r"\n\n+", text)):
        if paragraph in _TITLES:
            title = paragraph.title().replace("And", "and")
        elif len(paragraph.split()) > 10:
            yield title, paragraph


def _novels(text: str) -> list[tuple[str, str]]:
    """The first 25 words of a paragraph, and its novel."""
    return [
        (f"Which novel is this from? {' '.join(paragraph.split()[:25])}", title)
        for title, paragraph in _paragraphs(text)
        if len(paragraph.split()) >= 40
    ]


def _persons(sentences: list[str]) -> list[tuple[str, str]]:
    """A sentence that names one person with a title, and whether it is a man or a woman."""
    named = [(sentence, _PERSON.findall(sentence)) for sentence in sentences if 8 <= len(sentence.split()) <= 20]
    return [
        (f"Is this about a man or a woman? {sentence}", _SEX[names[0]]) for sentence, names in named if len(names) == 1
    ]


def _marks(sentences: list[str]) -> list[tuple[str, str]]:
    """A sentence without the mark at its end, and the mark."""
    ended = [sentence for sentence in sentences if sentence[-1] in _MARKS and 6 <= len(sentence.split()) <= 20]
    return [(f"Which mark ends this sentence? {sentence[:-1]}", _MARKS[sentence[-1]]) for sentence in ended]


def _balanced(pairs: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """`count` different pairs in chance order, their answers in turn as long as there are pairs with them."""
    by_answer = defaultdict(list)
    for question, answer in dict(pairs).items():
        by_answer[answer].append((question, answer))
    chance = random.Random(1)
    for answer in by_answer:
        chance.shuffle(by_answer[answer])
    rounds = max(map(len, by_answer.values()))
    in_turn = [some[index] for index in range(rounds) for some in by_answer.values() if index < len(some)]
    return chance.sample(in_turn[:count], count)


def _pair(kind: str, question: str, answer: str) -> dict:
    """A question and its answer as messages, the form that TRL reads."""
    return {
        "kind": kind,
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


if __name__ == "__main__":
    main()
