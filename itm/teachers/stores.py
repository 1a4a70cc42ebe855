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


def roots_of(recipe: Recipe) -> list[Recipe]:
    """The recipe itself, or, where it mixes several roots, one of each root: stores lie beside the shards they are of.

    Raises ValueError where the recipe says one place for the stores of several roots.
    """
    if not recipe.data.mix:
        return [recipe]
    if recipe.teachers.root:
        raise ValueError(
            "teachers.root is one place for the stores of several roots (data.mix): leave it unset, they lie beside the shards"
        )
    return [recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": one.root, "mix": []})}) for one in recipe.data.mix]


def store_for(recipe: Recipe, split: str, modality: str) -> sidecar.Store:
    """The finished store of the recipe's teacher, which it must name; no teacher is loaded.

    Raises ValueError naming the folder and the remedy when `itm teach` has not made it.
    """
    return sidecar.find_store(stores_root(recipe, split), choice_of(getattr(recipe.teachers, modality), modality, recipe.teachers.dtype))


def stored_identity(teacher: Teacher, dtype: str) -> dict[str, Any]:
    """The identity of a store: the teacher's, and how its vectors are kept."""
    return {**teacher.identity, "stored_as": dtype}
