"""The typed recipe: every choice of a run in one object, read from YAML with dotted overrides.

    recipe = load_recipe("demo.yaml", ["train.steps=50", "model.options.width=64"])
    recipe.fingerprint()            # 12 hex digits, the same for the same choices

An unknown key is an error that names the near one. `options` of a part are checked by the part that takes them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from itm.choices import apply_overrides, digest, flatten, known_to, merge, read_choices
from itm.kinds import packages_of
from itm.sections import Data, Evaluation, Features, Indexed, MixedRoot, Part, Registry, Strict, Teachers, Text, Train

__all__ = [
    "Data", "Evaluation", "Features", "Indexed", "Layer", "MixedRoot", "Part", "Recipe", "Registry", "Resolved", "Teachers", "Text",
    "Train", "load_recipe", "overridden", "parse_recipe", "resolve_recipe",
]  # fmt: skip

MOST_HOPS = 2  # of `extends`: who reads a recipe should have to open three files at most
OVERRIDE = "override"
_MISSING = object()


# Prose, places of outputs, processes and how they compute. What stood here in version 0.1.0 stays: `whole_fingerprint` needs it.
NO_CHOICES: dict[str, Any] = {
    "output": True,
    "allow": True,
    "about": True,
    "paper": True,
    "train": {
        "workers",
        "min_workers",
        "max_failures",
        "compile",
        "checkpoint_activations",
        "shard_weights",
        "deterministic",
        "hardest_pairs",
    },
    "data": {"decode", "decode_workers"},
    "teachers": {"actors"},
    "features": {"actors"},
    "index": True,
    "registry": {"loggers", "licence"},
}


class Recipe(Strict):
    name: str = Field(description="name of the run, its folder below `output`")
    seed: int = Field(0, description="of initial weights, order of pairs and augmentation")
    about: str = Field("", description="what this run is, in a sentence")
    paper: dict[str, Any] = Field(default_factory=dict, description="published figures and the decisions where code and paper differ")
    output: str = Field("runs", description="folder or URI; a run writes below <output>/<name>")
    allow: list[str] = Field(
        default_factory=list,
        description="packages whose parts may be loaded from matcher folders and the registry, beside those that this recipe names",
    )
    data: Data = Field(default_factory=Data)
    features: Features = Field(default_factory=Features)
    text: Text = Field(default_factory=Text)
    teachers: Teachers = Field(default_factory=Teachers)
    model: Part = Field(description="the matcher that is trained")
    method: Part = Field(Part(kind="matching"), description="how it is trained: its losses")
    train: Train = Field(default_factory=Train)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    index: Indexed = Field(default_factory=Indexed)
    registry: Registry = Field(default_factory=Registry)

    def fingerprint(self) -> str:
        """12 hex digits of the sha256 of all choices; prose, places of outputs, processes and how they compute do not count.

        A key at its default counts as one that is not there, so that a key that is added later makes no run another one.
        """
        return digest(self._choices(exclude_defaults=True))

    def whole_fingerprint(self, recorded: dict[str, Any]) -> str | None:
        """The fingerprint as version 0.1.0 made it, of all keys there were, defaults as well: those of the recipe that it `recorded`.

        None when this recipe chooses something by a key that was not there.
        """
        chosen = self._choices(exclude_defaults=True)
        return digest(known_to(self._choices(exclude_defaults=False), recorded)) if known_to(chosen, recorded) == chosen else None

    def _choices(self, exclude_defaults: bool) -> dict[str, Any]:
        choices = self.model_dump(mode="json", exclude=NO_CHOICES, exclude_defaults=exclude_defaults)
        return {name: value for name, value in choices.items() if value != {}}

    def flat(self) -> dict[str, Any]:
        """Dotted key -> scalar, for experiment tracking."""
        return flatten(self.model_dump(mode="json", exclude={"paper"}))

    @property
    def allowed(self) -> list[str]:
        """Packages that a matcher folder may name: a recipe is written by its user, so the packages that it names are chosen."""
        return sorted({*self.allow, *packages_of(self.model_dump(mode="json", exclude={"name", "about", "paper"}))})

    @property
    def folder(self) -> str:
        return f"{self.output.rstrip('/')}/{self.name}"


@dataclass(frozen=True)
class Layer:
    """Choices of one file of an `extends` chain, or of all overrides."""

    origin: str
    choices: dict[str, Any]


@dataclass(frozen=True)
class Resolved:
    """A recipe and the layers that it was made of, the one that has the last word last."""

    recipe: Recipe
    layers: tuple[Layer, ...]

    @property
    def written(self) -> dict[str, Any]:
        """What the files say, merged; without overrides and defaults."""
        return _merged(self.layers[:-1])

    def origin(self, key: tuple[str, ...], value: Any) -> str:
        """Where the value of a key comes from: the name of a file, `override`, or `default`."""
        for layer in reversed(self.layers):
            said: Any = layer.choices
            for name in key:
                said = said.get(name, _MISSING) if isinstance(said, dict) else _MISSING
            # A section is told key by key, but for an empty one, which a layer may have put in place of a full one.
            if said is not _MISSING and (not isinstance(value, dict) or said == value):
                return layer.origin
        return "default"


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe and apply `key.sub=value` overrides (values are YAML).

    A recipe may start from another by `extends: other.yaml` (relative to its own folder), which may start from a third one, and no
    further; mappings merge key by key. Raises ValueError naming the file, the key and the nearest known key.
    """
    return resolve_recipe(path, overrides).recipe


def resolve_recipe(path: str | Path, overrides: list[str] | None = None) -> Resolved:
    """The recipe of `load_recipe` with the layers it was made of."""
    layers = _layers(Path(path))
    choices = _merged(layers)
    apply_overrides(choices, overrides or [])
    given: dict[str, Any] = {}
    apply_overrides(given, overrides or [])
    return Resolved(parse_recipe(choices, where=str(path)), (*layers, Layer(OVERRIDE, given)))


def _merged(layers: Iterable[Layer]) -> dict[str, Any]:
    choices: dict[str, Any] = {}
    for layer in layers:
        choices = merge(choices, layer.choices)
    return deepcopy(choices)


def overridden(recipe: Recipe, overrides: list[str]) -> Recipe:
    """The recipe with `key.sub=value` overrides applied. Raises ValueError as `load_recipe`."""
    choices = recipe.model_dump(mode="json", exclude_unset=True)
    apply_overrides(choices, overrides)
    return parse_recipe(choices, where=recipe.name)


def parse_recipe(choices: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a nested dict. Raises ValueError with every problem, one a line."""
    try:
        return Recipe.model_validate(choices)
    except ValidationError as error:
        raise ValueError("\n".join(f"{where}: {_explain(e)}" for e in error.errors())) from None


def _layers(path: Path) -> list[Layer]:
    """The files of an `extends` chain, the first base first. Raises ValueError for a circle, and for more than MOST_HOPS hops."""
    chain: list[tuple[Path, Layer]] = []
    while True:
        choices = read_choices(path, wanted_by=chain[-1][0] if chain else None)
        base = choices.pop("extends", None)
        chain.append((path, Layer(path.name, choices)))
        if base is None:
            return [layer for _, layer in reversed(chain)]
        if not isinstance(base, str):
            raise ValueError(f"{path}: extends takes the name of one recipe file, not {base!r}")
        names = " -> ".join([*(layer.origin for _, layer in chain), base])
        path = path.parent / base
        if path.resolve() in [earlier.resolve() for earlier, _ in chain]:
            raise ValueError(f"{chain[0][0]}: `extends` goes in a circle, {names}; take one of them out")
        if len(chain) > MOST_HOPS:
            raise ValueError(
                f"{chain[0][0]}: {names} is more than {MOST_HOPS} hops of `extends`; "
                f"let {chain[-2][1].origin} start from {base}, and copy into it what it takes from {chain[-1][1].origin}"
            )


def _explain(error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        return f"{key}: {error['msg']}"
    known = _known_keys(error["loc"][:-1])
    near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}")


def _known_keys(section: tuple[Any, ...]) -> list[str]:
    model: Any = Recipe
    for name in section:
        annotation = model.model_fields[name].annotation
        model = next((a for a in (annotation, *getattr(annotation, "__args__", ())) if hasattr(a, "model_fields")), None)
        if model is None:
            return []
    return list(model.model_fields)
