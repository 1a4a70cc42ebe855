"""STS 2012 to 2016, STS-B and SICK-R in the folders of SentEval, measured as SentEval measures them.

    <folder>/STS/STS12-en-test/STS.input.MSRpar.txt, STS.gs.MSRpar.txt, ...       two sentences a line; their rating, or nothing
    <folder>/STS/STSBenchmark/sts-test.csv      <folder>/SICK/SICK_test_annotated.txt

Protocol: docs/methods/cusa.md#sentence-similarity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from itm.data import files
from itm.data.formats import Json
from itm.data.sources.source import read_text
from itm.evaluation.protocols import MatcherProtocol, Outcome, Question
from itm.evaluation.sentence_pairs import RatedPairs, check_usable, cosines_of, read_pairs, spearman
from itm.types import Matcher

SUBSETS = {
    "STS12": ("MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews"),
    "STS13": ("FNWN", "headlines", "OnWN"),
    "STS14": ("deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news"),
    "STS15": ("answers-forums", "answers-students", "belief", "headlines", "images"),
    "STS16": ("answer-answer", "headlines", "plagiarism", "postediting", "question-question"),
}
"""Those that SentEval reads: SMT of 2013 is not free."""
SINGLE = {"STS-B": "STSBenchmark/sts-test.csv", "SICK-R": "SICK/SICK_test_annotated.txt"}


class SentEval(MatcherProtocol):
    """`sts_<task>`: 100 x Spearman over all pairs of a task, its subsets together, and the mean of the tasks, each rounded to 2 decimals.

    Of a task with subsets also each of them, their mean, and their mean weighted by pairs (`_mean`, `_wmean`).
    """

    reads: ClassVar[Literal["split", "pairs"]] = "pairs"
    score_type: ClassVar[str] = "cosine of captions, fp32"
    tasks: ClassVar[tuple[str, ...]] = (*SUBSETS, *SINGLE)

    def files_of(self, pairs: Sequence[str]) -> list[str]:
        """Raises ValueError unless one folder is given that holds the files of all tasks, naming those that it lacks."""
        if len(pairs) != 1:
            raise ValueError(f"--pairs names one folder of SentEval (its data/downstream), not {len(pairs)}")
        found = [uri for task in self.tasks for uri in _files_of(task, files.absolute(pairs[0]))]
        if lost := [uri for uri in found if not files.exists(uri)]:
            raise ValueError(f"{len(lost)} of {len(found)} files of {', '.join(self.tasks)} are missing, the first is {lost[0]}")
        return found

    def measure(self, matcher: Matcher, asked: Question) -> Outcome:
        self.files_of(asked.pairs)
        metrics: dict[str, float] = {}
        whole: list[float] = []
        rejected: list[list[object]] = []
        pairs = 0
        for task in self.tasks:
            read = _read(task, files.absolute(asked.pairs[0]), asked.max_reject_rate)
            cosines = {name: cosines_of(matcher, part, asked.batch_size, asked.device) for name, part in read.items()}
            found = of_task(cosines, {name: np.array(part.gold) for name, part in read.items()})
            metrics |= {f"sts_{task}{name}": value for name, value in found.items()}
            whole.append(round(found[""], 2))
            pairs += sum(len(part.gold) for part in read.values())
            rejected += [[part.path, line, reason] for part in read.values() for line, reason in part.bad]
        if len(self.tasks) > 1:
            metrics["sts_mean"] = float(np.mean(whole))
        title = f"{', '.join(self.tasks)} as SentEval: 100 x Spearman of caption cosines and ratings, all pairs of a task together"
        details: Json = {"rejected_rows": rejected}
        return Outcome(title, metrics, dict.fromkeys(metrics, 0.0), {"pairs": pairs, "rejected": len(rejected)}, details)


class STS12(SentEval):
    tasks: ClassVar[tuple[str, ...]] = ("STS12",)


class STS13(SentEval):
    tasks: ClassVar[tuple[str, ...]] = ("STS13",)


class STS14(SentEval):
    tasks: ClassVar[tuple[str, ...]] = ("STS14",)


class STS15(SentEval):
    tasks: ClassVar[tuple[str, ...]] = ("STS15",)


class STS16(SentEval):
    tasks: ClassVar[tuple[str, ...]] = ("STS16",)


def of_task(cosines: dict[str, np.ndarray], ratings: dict[str, np.ndarray]) -> dict[str, float]:
    """100 x Spearman, by what is added to the name of a task: "" all pairs together, `_<subset>`, `_mean` and `_wmean` of the subsets."""
    together = (np.concatenate([side[name] for name in ratings]) for side in (cosines, ratings))
    found = {"": 100 * spearman(*together)}
    if len(ratings) > 1:
        each = {name: 100 * spearman(cosines[name], ratings[name]) for name in ratings}
        weights = [len(ratings[name]) for name in each]
        found |= {f"_{name}": value for name, value in each.items()}
        found |= {"_mean": float(np.mean(list(each.values()))), "_wmean": float(np.average(list(each.values()), weights=weights))}
    return found


def _files_of(task: str, folder: str) -> list[str]:
    """`folder` is SentEval's, the folder `STS` in it, or the task's own."""
    if task in SINGLE:
        parts = SINGLE[task].split("/")
        tried = [files.join(folder, *prefix, *parts[skip:]) for prefix, skip in (((), 0), (("STS",), 0), ((), 1))]
        return [next((uri for uri in tried if files.exists(uri)), tried[1 if task == "STS-B" else 0])]
    tried = [files.join(folder, *prefix) for prefix in (("STS", f"{task}-en-test"), (f"{task}-en-test",), ())]
    own = next((place for place in tried[:2] if files.is_folder(place)), tried[2] if f"{task}-" in folder.rpartition("/")[2] else tried[0])
    return [files.join(own, f"STS.{part}.{name}.txt") for name in SUBSETS[task] for part in ("input", "gs")]


def _read(task: str, folder: str, max_reject_rate: float) -> dict[str, RatedPairs]:
    found = _files_of(task, folder)
    if task in SINGLE:
        return {task: read_pairs(found[0], max_reject_rate=max_reject_rate)}
    both = zip(SUBSETS[task], found[::2], found[1::2], strict=True)
    return {name: read_subset(sentences, ratings, max_reject_rate) for name, sentences, ratings in both}


def read_subset(sentences: str, ratings: str, max_reject_rate: float = 0.01) -> RatedPairs:
    """The rated pairs of two files, line by line; a pair whose line of ratings is empty was not rated and is left out, as SentEval does.

    Raises ValueError for files of different length, and as `check_usable`.
    """
    lines, gold = (read_text(uri).removesuffix("\n").split("\n") for uri in (sentences, ratings))
    if len(lines) != len(gold):
        raise ValueError(f"{sentences} has {len(lines)} lines, {ratings} has {len(gold)}: they are not of one subset")
    pairs = RatedPairs(sentences, [], [], [])
    for number, (line, said) in enumerate(zip(lines, gold, strict=True), 1):
        if not said.strip():
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        rating = _number(said)
        if len(cells) != 2 or not all(cells):
            pairs.bad.append((number, f"{len(cells)} columns, two sentences are needed" if len(cells) != 2 else "a sentence is empty"))
        elif not math.isfinite(rating):
            pairs.bad.append((number, f"{ratings}: the rating {said.strip()!r} is no finite number"))
        else:
            pairs.left.append(cells[0])
            pairs.right.append(cells[1])
            pairs.gold.append(rating)
    return check_usable(pairs, max_reject_rate)


def _number(said: str) -> float:
    try:
        return float(said)
    except ValueError:
        return math.nan
