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
    """The identity of a store: the teacher's, how its vectors are kept, and how many a sample has where that is not one."""
    return {**teacher.identity, "stored_as": dtype} | ({"views": teacher.views} if teacher.views > 1 else {})


def crops_of(recipe: Recipe, store: sidecar.Store) -> int | None:
    """The seed of the crops of a store of which training reads one view at a time; None where it reads the mean.

    Raises ValueError where `teachers.views: one` cannot be: the store has no views, or the model would not see the crop of the view.
    """
    if recipe.teachers.views == "mean":
        return None
    identity = store.identity
    while identity["kind"] != "views" and isinstance(identity.get("of"), dict):  # a shuffled control
        identity = identity["of"]
    if identity["kind"] != "views":
        raise ValueError(f"teachers.views=one: {store.uri} has one vector an image; take the teacher `views`, or leave the key out")
    if recipe.data.crop != "random" or recipe.data.flip != identity["flip"]:
        raise ValueError(
            "teachers.views=one shows the model the crop that the teacher saw: set data.crop=random "
            f"and data.flip={str(identity['flip']).lower()}, as the teacher has it, or read the mean"
        )
    return int(identity["seed"])
