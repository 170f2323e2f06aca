"""Make the questions of both tasks from the last chapters of examples/data/austen.txt, always the same ones.

python examples/lm_eval/make_questions.py [FOLDER]      # FOLDER: where to write them, if not beside this file
"""

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_FOLDER = Path(__file__).parent
_TEXT = _FOLDER.parent / "data/austen.txt"
_SEPARATOR = "\n\nCHAPTER "
_NUM_QUESTIONS = 400
_PASSAGE, _ENDING = 30, 10  # words
_MIN_COUNT, _MIN_LETTERS = 50, 4  # a word to be guessed is no rare one, and no article
_SENTENCE_ENDS = re.compile(r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.) (?=[A-Z])")
_AS_FREQUENT = 20  # wrong words come from as many neighbours in the order of frequency


def main() -> None:
    """Write austen_ending.jsonl and austen_word.jsonl."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else _FOLDER
    text = _TEXT.read_text(encoding="utf-8")
    chapters = text.split(_SEPARATOR)
    held_out = chapters[round(0.95 * len(chapters)) :]  # what `data.split: [95, 5]` keeps from training
    paragraphs = [" ".join(paragraph.split()) for chapter in held_out for paragraph in chapter.split("\n\n")[1:]]
    for name, questions in (("austen_ending", _endings(paragraphs)), ("austen_word", _words(paragraphs, text))):
        chosen = sorted(random.Random(1).sample(list(enumerate(questions)), _NUM_QUESTIONS))
        lines = (json.dumps(question, ensure_ascii=False) + "\n" for _, question in chosen)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _endings(paragraphs: list[str]) -> list[dict]:
    """30 words of a paragraph, and four endings of 10: the one that follows, and three that follow elsewhere."""
    length = _PASSAGE + _ENDING
    words = [paragraph.split() for paragraph in paragraphs]
    pieces = [part[start : start + length] for part in words for start in range(0, len(part) - length + 1, length)]
    right = [" ".join(piece[_PASSAGE:]) for piece in pieces]
    chance = random.Random(1)
    return [
        _question(" ".join(piece[:_PASSAGE]), ending, chance.sample([other for other in right if other != ending], 3))
        for piece, ending in zip(pieces, right)
    ]


def _words(paragraphs: list[str], text: str) -> Iterator[dict]:
    """A sentence up to a word, and four ways on: the word or three that are as frequent, each with the same rest."""
    counts = Counter(re.findall(rf"\b[a-z]{{{_MIN_LETTERS},}}\b", text))
    ranked = [word for word, count in counts.most_common() if count >= _MIN_COUNT]
    place = {word: index for index, word in enumerate(ranked)}
    chance = random.Random(1)
    for sentence in (part for paragraph in paragraphs for part in _SENTENCE_ENDS.split(paragraph)):
        gaps = [gap for gap in re.finditer(r"(?<= )[a-z]+(?=[ ,;])", sentence) if gap.group() in place]
        if not gaps or not 10 <= len(sentence.split()) <= 40:
            continue
        gap = chance.choice(gaps)
        first = max(0, place[gap.group()] - _AS_FREQUENT // 2)
        others = [word for word in ranked[first : first + _AS_FREQUENT + 1] if word != gap.group()]
        rest = sentence[gap.end() :]
        yield _question(
            sentence[: gap.start() - 1], gap.group() + rest, [word + rest for word in chance.sample(others, 3)]
        )


def _question(context: str, right: str, wrong: list[str]) -> dict:
    choices = [right, *wrong]
    random.Random(context).shuffle(choices)
    return {"context": context, "choices": choices, "answer": choices.index(right)}


if __name__ == "__main__":
    main()
