"""Photos -> region shards: what the stage `itm features` stands on."""

from __future__ import annotations

from typing import Any, cast

from itm.config import Part, Recipe
from itm.sections import Features


def of_photos(recipe: Recipe) -> Recipe:
    """The recipe of the photos that features are made of; itself where it asks for no features."""
    if recipe.features.photos is None:
        return recipe
    data = recipe.data.model_copy(update={"root": recipe.features.photos, "image": "pixels", "cache_features": False})
    return recipe.model_copy(update={"data": data, "features": Features()})


def encoder_of(recipe: Recipe) -> Part:
    """The image encoder whose cells become regions. Raises ValueError where the recipe names none."""
    from itm.kinds import find_part, options_of
    from itm.matchers.encoders.build import IMAGE_ENCODERS

    part, image = recipe.features.encoder, recipe.model.options.get("image")
    if part is None:
        if not isinstance(image, dict) or image.get("kind") in (None, "regions"):
            raise ValueError("set features.encoder: the image encoder that makes the features (or an image tower in model.options.image)")
        part = Part(kind=image["kind"], options={name: value for name, value in image.items() if name != "kind"})
    sized = "image_size" in options_of(find_part(cast(Any, IMAGE_ENCODERS), part.kind, "image encoder"))[0]  # as `build_matcher` does
    return part.model_copy(update={"options": ({"image_size": recipe.data.image_size} if sized else {}) | part.options})
