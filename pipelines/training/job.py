"""A checked training run, as the driver hands it to the workers, and how each of them builds what it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from itm.config import Recipe
from itm.data import files
from itm.data.manifest import Manifest
from itm.data.mix import MixedStore, Mixture
from itm.data.preprocess import Inputs
from itm.data.sidecar import Store
from itm.kinds import build_part
from itm.matchers.folder import build_matcher, take_weights
from itm.matchers.uni_heads import give_heads
from itm.methods import METHODS
from itm.teachers.identity import Modality
from itm.teachers.online import Online
from itm.types import Method
from pipelines.training.course import Course

START = "start"  # the matcher that a run fine-tunes, copied into its folder: an alias may move while it trains


@dataclass(frozen=True)
class Job:
    """A checked training run. Every path in it is absolute: a Ray worker has another working directory."""

    recipe: Recipe
    manifest: Manifest | Mixture
    course: Course
    inputs: Inputs
    stores: dict[str, Store | MixedStore]
    run_id: str
    tracking_uri: str
    online: Mapping[Modality, Online] = field(default_factory=dict)

    @property
    def teachers(self) -> dict[str, str]:
        """Modality -> the id of its teacher."""
        stored = {modality: store.teacher for modality, store in self.stores.items()}
        return stored | {str(modality): one.teacher for modality, one in self.online.items()}

    @property
    def folder(self) -> str:
        return self.recipe.folder

    @property
    def checkpoints(self) -> str:
        return files.join(self.folder, "checkpoints")

    def split(self, name: str) -> str:
        return files.join(self.recipe.data.root, name)


def build_method(recipe: Recipe, inputs: Inputs) -> Method:
    """The method around a matcher, fresh (the same weights for the same seed) or with the weights of `train.start`.

    Raises ValueError for what cannot run together.
    """
    torch.manual_seed(recipe.seed)
    matcher = build_matcher(recipe.model, inputs)
    if recipe.train.start:
        take_weights(matcher, files.join(recipe.folder, START), recipe.allowed)
    method = build_part(METHODS, recipe.method.kind, recipe.method.options, "method", matcher=matcher)
    give_heads(matcher, None)  # uni heads of before that the method does not train would not fit what it makes of the rest
    return method
