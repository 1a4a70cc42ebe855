"""STS: does the cosine of two captions follow how people rate their likeness? Rank correlation over files of rated sentence pairs.

A file is STS-B (GLUE's TSV with a header, or the original without one), SICK, or any CSV or TSV with two sentences and a number.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

from itm.data import files
from itm.evaluation.dataset import encode_texts
from itm.evaluation.protocols import MatcherProtocol, Outcome, Question
from itm.evaluation.uni_modal import uni_vectors
from itm.types import Matcher

# First sentence, second sentence, rating: headers that published files have.
KNOWN_HEADERS = (("sentence1", "sentence2", "score"), ("sentence_A", "sentence_B", "relatedness_score"))
ORIGINAL_STS = (6, 7, 5)  # columns, from 1, of the original STS-B files, which have no header


@dataclass(frozen=True)
class RatedPairs:
    """left[k] and right[k] were rated gold[k]; bad: (line number from 1, reason) of rows that could not be used."""

    path: str
    left: list[str]
    right: list[str]
    gold: list[float]
    bad: list[tuple[int, str]] = field(default_factory=list)


def read_pairs(path: str | Path, columns: Sequence[str] | None = None, max_reject_rate: float = 0.01) -> RatedPairs:
    """columns: headers of the two sentences and the rating, or their numbers from 1 in a file without header; unset = found out.

    A tab in the first line makes it a TSV, which knows no quotes. Raises ValueError for columns that are not there, and when no row, or a
    larger share than `max_reject_rate`, cannot be used.
    """
    text = files.read_bytes(path).decode("utf-8-sig")
    first = text.partition("\n")[0]
    tabs = "\t" in first
    lines = text.splitlines(keepends=True)
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines)
    header = [cell.strip() for cell in next(reader, [])]
    places, has_header = _places(str(path), header, columns)
    pairs = RatedPairs(str(path), [], [], [])
    rows = [(reader.line_num, row) for row in reader]
    for number, row in rows if has_header else [(1, header), *rows]:
        if not "".join(row).strip():
            continue
        try:
            left, right, gold = (row[place].strip() for place in places)
            if not (left and right):
                raise ValueError("a sentence is empty")
            rating = float(gold)
            if not math.isfinite(rating):
                raise ValueError(f"the rating {gold!r} is no finite number")
        except IndexError:
            pairs.bad.append((number, f"{len(row)} columns, column {max(places) + 1} is needed"))
        except ValueError as error:
            pairs.bad.append((number, str(error)))
        else:
            pairs.left.append(left)
            pairs.right.append(right)
            pairs.gold.append(rating)
    return check_usable(pairs, max_reject_rate)


def check_usable(pairs: RatedPairs, max_reject_rate: float) -> RatedPairs:
    """Raises ValueError naming the first bad rows when fewer than two, or too small a share of them, can be used."""
    total = len(pairs.gold) + len(pairs.bad)
    if len(pairs.gold) < 2 or len(pairs.bad) > max_reject_rate * total:
        named = "; ".join(f"line {number}: {reason}" for number, reason in pairs.bad[:3]) or "two pairs are the least"
        raise ValueError(f"{pairs.path}: {len(pairs.bad)} of {total} rows cannot be used (limit {max_reject_rate:.1%}): {named}")
    return pairs


def sts(matcher: Matcher, files: Sequence[RatedPairs], batch_size: int = 256, device: str | torch.device = "cpu") -> Outcome:
    """100 x Spearman of the cosines of each file, `sts_<stem>`, and `sts_mean` of the values rounded to 2 decimals.

    Protocol: docs/methods/cusa.md#sentence-similarity.

    Vectors: the uni-modal head where the matcher has one, else the caption vector. Sentences are tokenised as they stand, without the
    clean-up that captions may have: so CUSA's authors do it.
    """
    metrics: dict[str, float] = {}
    for pairs in files:
        name = f"sts_{Path(pairs.path).stem}"
        if name in metrics:
            raise ValueError(f"two files of pairs are called {Path(pairs.path).stem!r}: their results would have one name; rename one")
        metrics[name] = 100 * spearman(cosines_of(matcher, pairs, batch_size, device), np.array(pairs.gold))
    if len(files) > 1:
        metrics["sts_mean"] = float(np.mean([round(value, 2) for value in metrics.values()]))
    counts = {"pairs": sum(len(p.gold) for p in files), "rejected": sum(len(p.bad) for p in files)}
    title = "STS: 100 x Spearman of caption cosines and ratings; ties share their mean rank"
    return Outcome(title, metrics, dict.fromkeys(metrics, 0.0), counts)


def cosines_of(matcher: Matcher, pairs: RatedPairs, batch_size: int = 256, device: str | torch.device = "cpu") -> np.ndarray:
    """(N,) cosines of the two sentences of each pair, as they are written."""
    with _as_written(matcher):
        left, right = (uni_vectors(encode_texts(matcher, texts, batch_size, device), "caption") for texts in (pairs.left, pairs.right))
    return torch.cosine_similarity(left, right).numpy()


@contextmanager
def _as_written(matcher: Matcher) -> Iterator[None]:
    """The tokenizer of the matcher without its clean-up of captions."""
    tokenizer = matcher.inputs.tokenizer
    before, tokenizer.clean = tokenizer.clean, False
    try:
        yield
    finally:
        tokenizer.clean = before


class STS(MatcherProtocol):
    """`sts` of rated sentence pairs; the rows that could not be used are named in `rejected_rows`."""

    reads: ClassVar[Literal["split", "pairs"]] = "pairs"
    score_type: ClassVar[str] = "cosine of captions, fp32"

    def measure(self, matcher: Matcher, asked: Question) -> Outcome:
        found = [read_pairs(path, asked.columns, asked.max_reject_rate) for path in asked.pairs]
        bad = [[file.path, line, reason] for file in found for line, reason in file.bad]
        return replace(sts(matcher, found, asked.batch_size, asked.device), details={"rejected_rows": bad})


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of the ranks, equal values sharing their mean rank; NaN when one side is constant. a, b (N,)."""
    left, right = _ranks(a), _ranks(b)
    return float(np.corrcoef(left, right)[0, 1]) if np.ptp(left) and np.ptp(right) else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _places(path: str, header: list[str], columns: Sequence[str] | None) -> tuple[list[int], bool]:
    """Column numbers from 0 of the sentences and the rating, and whether the first line is a header."""
    if columns is not None:
        if len(columns) != 3:
            raise ValueError(f"the columns of {path} are three: first sentence, second sentence, rating; not {', '.join(columns)}")
        if all(name in header for name in columns):
            return [header.index(name) for name in columns], True
        if all(name.isdigit() and 1 <= int(name) <= len(header) for name in columns):
            return [int(name) - 1 for name in columns], False
        missing = [name for name in columns if name not in header]
        raise ValueError(f"{path} has no column {missing[0]!r}; its first line is: {', '.join(header)}")
    for names in KNOWN_HEADERS:
        if all(name in header for name in names):
            return [header.index(name) for name in names], True
    if len(header) >= max(ORIGINAL_STS) and _is_number(header[ORIGINAL_STS[2] - 1]):
        return [place - 1 for place in ORIGINAL_STS], False
    raise ValueError(f"{path} has none of the known columns; choose by --pair-columns FIRST,SECOND,RATING from: {', '.join(header)}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
