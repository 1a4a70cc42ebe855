"""Where the soft-label stores of a recipe lie, and which identity they have."""

from __future__ import annotations

from typing import Any

from itm.config import Recipe
from itm.data import files, sidecar
from itm.teachers.identity import Teacher, choice_of


def stores_root(recipe: Recipe, split: str) -> str:
    """The folder of a split's stores, absolute when local (workers have another working directory)."""
    root = recipe.teachers.root
    return files.absolute(files.join(root, split) if root else files.join(recipe.data.root, split, "teachers"))


def store_for(recipe: Recipe, split: str, modality: str) -> sidecar.Store:
    """The finished store of the recipe's teacher, which it must name; no teacher is loaded.

    Raises ValueError naming the folder and the remedy when `itm teach` has not made it.
    """
    return sidecar.find_store(stores_root(recipe, split), choice_of(getattr(recipe.teachers, modality), modality, recipe.teachers.dtype))


def stored_identity(teacher: Teacher, dtype: str) -> dict[str, Any]:
    """The identity of a store: the teacher's, and how its vectors are kept."""
    return {**teacher.identity, "stored_as": dtype}
