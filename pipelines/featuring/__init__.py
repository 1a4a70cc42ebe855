"""Photos -> region shards: what the stage `itm features` stands on."""

from __future__ import annotations

from itm.config import Part, Recipe


def of_photos(recipe: Recipe) -> Recipe:
    """The recipe of the photos that features are made of; itself where it asks for no features."""
    if recipe.features.photos is None:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": recipe.features.photos, "image": "pixels"})})


def encoder_of(recipe: Recipe) -> Part:
    """The image encoder whose cells become regions. Raises ValueError where the recipe names none."""
    if recipe.features.encoder is not None:
        return recipe.features.encoder
    image = recipe.model.options.get("image")
    if not isinstance(image, dict) or image.get("kind") in (None, "regions"):
        raise ValueError("set features.encoder: the image encoder that features are made with (or an image tower in model.options.image)")
    return Part(kind=image["kind"], options={name: value for name, value in image.items() if name != "kind"})
