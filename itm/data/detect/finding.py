"""What a look at raw data gives: a finding, or a question where two readings are possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from itm.config import Part

Answers = Mapping[str, str]
"""Answers to questions: name of the flag without its dashes -> value."""

TRAIN = ("train", "training", "trn", "tr")
VAL = ("val", "valid", "validation", "dev", "minival")
TEST = ("test", "testing", "tst", "eval")
ROLES: dict[str, tuple[str, ...]] = {"train": TRAIN, "val": VAL, "test": TEST}


@dataclass(frozen=True)
class Finding:
    """One reading of the data.

    layout: it in words. source: what packs it; None where shards exist already, below `root`. splits: role (train, val, test) -> name of
    the split, of those that are there. captioned: whether there are captions to train on. notes: what was chosen or left aside, and why.
    """

    layout: str
    source: Part | None = None
    root: str = ""
    splits: Mapping[str, str] = field(default_factory=dict)
    image: Literal["pixels", "regions"] = "pixels"
    captioned: bool = True
    notes: tuple[str, ...] = ()


class Question(ValueError):
    """Two readings are possible. `flag` answers it; `answers` maps each value of the flag to what it would mean."""

    def __init__(self, asked: str, flag: str, answers: Mapping[str, str]) -> None:
        shown = "".join(f"\n  --{flag} {value}   {meaning}" for value, meaning in answers.items())
        super().__init__(f"{asked}; say which it is:{shown}")
        self.asked, self.flag, self.answers = asked, flag, dict(answers)


def choose(asked: str, flag: str, found: Mapping[str, str], answers: Answers) -> str:
    """The one value of `found` (value -> meaning), or the answered one. Raises Question for several, ValueError for none."""
    if flag in answers:
        if answers[flag] not in found:
            raise ValueError(f"--{flag} {answers[flag]}: there is only {', '.join(found) or 'nothing to choose from'}")
        return answers[flag]
    if len(found) == 1:
        return next(iter(found))
    raise Question(asked, flag, found)


def role_of(name: str) -> str | None:
    """train, val or test, where a name says one of them as a word of its own: `captions_val2017.json`, `dev`, `f30k-test`."""
    import re

    words = set(re.split(r"[^a-z]+", name.lower()))
    found = [role for role, known in ROLES.items() if words & set(known)]
    return found[0] if len(found) == 1 else None


def roles_of(names: list[str]) -> dict[str, str]:
    """role -> name, the first of each role; names that say no role are left out."""
    roles: dict[str, str] = {}
    for name in names:
        if (role := role_of(name)) is not None:
            roles.setdefault(role, name)
    return dict(sorted(roles.items(), key=lambda item: list(ROLES).index(item[0])))
