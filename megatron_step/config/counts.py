"""Numbers with their nouns, for messages: 1 document, 2,000 documents."""


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return `number` with its noun, which is in the plural unless the number is 1.

    `plural` is the noun's plural if that is not the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
