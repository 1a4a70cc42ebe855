"""What is said of a registered model beside its numbers: the description of a version and the model card in its package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LONGEST_DESCRIPTION = 5000  # characters; MLflow's limit for a version
_SHOWN = ("rsum", "i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")  # first


@dataclass(frozen=True)
class Card:
    """group: the heading under which the figures stand in MLflow, e.g. test/auto. recipe: its YAML. Empty texts are not known.

    others: heading -> figures of the same weights by other protocols or on other splits.
    """

    title: str
    group: str
    about: str = ""
    model: str = ""
    train_data: str = ""
    test_data: str = ""
    teachers: str = ""
    code: str = ""
    licence: str = ""
    recipe: str = ""
    others: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def markdown(self, metrics: Mapping[str, float], chance: Mapping[str, float]) -> str:
        """The card with the figures of the test, each beside what chance gives."""
        facts = {
            "Model": self.model,
            "Training data": self.train_data,
            "Teachers": self.teachers or "none",
            "Code": self.code,
            "Licence of the weights": self.licence or "not stated (recipe key registry.licence); that of the training data may bind them",
        }
        names = [*(name for name in _SHOWN if name in metrics), *(name for name in metrics if name not in _SHOWN)]
        rows = [f"| {name} | {metrics[name]:.4g} | {f'{chance[name]:.4g}' if name in chance else ''} |" for name in names]
        parts = [
            f"# {self.title}",
            self.about,
            "\n".join(f"- {name}: {text}" for name, text in facts.items() if text),
            f"## Measured on {self.test_data}\n\n| metric | value | chance |\n|---|---:|---:|\n" + "\n".join(rows),
            "\n\n".join(f"## {name}\n\n{_table(found)}" for name, found in self.others.items()),
            "## Limits\n\n"
            "- The figures hold for data like that of the test; for other photos, languages or styles they say little.\n"
            "- Scores rank images and captions against each other. They are no probabilities, and no two models' scores compare.\n"
            "- What the training data shows often is found more easily; nothing was done against their prejudices.",
        ]
        return "\n\n".join(filter(None, parts)) + "\n"

    def readme(self, metrics: Mapping[str, float], chance: Mapping[str, float]) -> str:
        """The card as the README of the package, with the head that model hubs read."""
        head = [f"license: {self.licence}"] * bool(self.licence) + ["tags: [image-text-retrieval]"]
        return "---\n" + "\n".join(head) + "\n---\n\n" + self.markdown(metrics, chance)


def _table(found: Mapping[str, float]) -> str:
    return "| metric | value |\n|---|---:|\n" + "\n".join(f"| {name} | {value:.4g} |" for name, value in found.items())
