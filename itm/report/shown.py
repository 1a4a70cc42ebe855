"""What the page about a run shows, before it is laid out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Evaluation = Mapping[str, Any]
"""The content of an evaluation.json."""
Losses = Sequence[Mapping[str, float]]
"""The rows of a losses.jsonl."""


@dataclass(frozen=True)
class Page:
    """What the page shows. `others`, `other_losses`: by name, of the runs to compare with; `thumbnails`: image key -> data URI;
    `lineage`: label -> text; `validations`: rows of step and metrics, `other_validations` of the compared runs; `missing`: what is not
    here, and what would bring it; `protocols`: name -> evaluation of the same weights by another protocol or on another split; `pictures`:
    the numbers of the pictures (pictures.json), `photo`: the image of their pair, a data URI; `disagreements`: name of a compared run ->
    `itm.report.answers.disagreements`."""

    title: str
    about: str
    evaluation: Evaluation
    losses: Losses = ()
    others: Mapping[str, Evaluation] = field(default_factory=dict)
    other_losses: Mapping[str, Losses] = field(default_factory=dict)
    thumbnails: Mapping[str, str] = field(default_factory=dict)
    lineage: Mapping[str, str] = field(default_factory=dict)
    validations: Losses = ()
    missing: Sequence[str] = ()
    other_validations: Mapping[str, Losses] = field(default_factory=dict)
    protocols: Mapping[str, Evaluation] = field(default_factory=dict)
    pictures: Mapping[str, Any] = field(default_factory=dict)
    photo: str = ""
    disagreements: Mapping[str, Any] = field(default_factory=dict)
