"""Words as the vocabularies of SCAN, SGRAF and UARDA hold them: Penn Treebank tokenisation, without NLTK or its data.

What they are: docs/methods/scan.md#vocabulary-and-tokens.

The authors' files were made by NLTK's `word_tokenize`, which first cuts a caption into sentences by a trained model. Here a period in
the middle of a caption is taken off its word unless the vocabulary knows the word with it ("mr.", "u.s.").
"""

from __future__ import annotations

import re
from collections.abc import Container

OPENING, CLOSING = "``", "''"
_STEPS = [
    (re.compile(r'^\s*"|(?<=[ (\[{<])(?:"|\'\')'), f" {OPENING} "),
    (re.compile(r"([«“‘„]|`+)"), r" \1 "),
    (re.compile(r"(?<!\w)'(?=\w)(?!(?:[mtsdn]|re|ve|ll)\b)"), "' "),  # an opening quote, not a clitic by itself
    (re.compile(r"(?<=[^.])\.(?=[\])}>\"'»”’ ]*$)"), " . "),  # the last period of the text
    (re.compile(r"[:,](?!\d)"), r" \g<0> "),
    (re.compile(r"\.{2,}|--|[;@#$%&?!*()\[\]{}<>»”’]"), r" \g<0> "),
    (re.compile(r"(?<=[^'])'(?= )"), " ' "),
    (re.compile(r"''|\""), f" {CLOSING} "),
    (re.compile(r"(?<=[^' ])('(?:s|m|d|ll|re|ve)|n't)(?= )"), r" \1"),
    (re.compile(r"\b(can)(not)\b|\b(gim|lem)(me)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b"), None),
]


def treebank_words(text: str, known: Container[str] = ()) -> list[str]:
    """The lower-cased words and punctuation marks of a caption; `known` = the vocabulary, for words that end in a period."""
    line = f"{text.lower().strip()} "
    for pattern, replacement in _STEPS:
        line = pattern.sub(replacement or _halves, line)
    return [part for word in line.split() for part in _without_period(word, known)]


def _halves(found: re.Match[str]) -> str:
    return " ".join(half for half in found.groups() if half)


def _without_period(word: str, known: Container[str]) -> list[str]:
    if len(word) < 2 or not word.endswith(".") or word in known or not word.strip("."):
        return [word]
    return [word[:-1], "."]
