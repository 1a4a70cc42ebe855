"""What sections of a recipe are made of, and the sections that stand on their own: features, and how encoders learn."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(Strict):
    """A part and the keyword arguments it is built with. `kind`: a name, or `package.module:Name` for a part of one's own."""

    kind: str
    options: dict[str, Any] = Field(default_factory=dict)


class Features(Strict):
    """Region features that `itm features` makes of photos: with `photos` set, `itm pack` writes there, and they go to `data.root`."""

    photos: str | None = Field(None, description="folder or URI of shards of photos, one sub-folder a split; unset = no such stage")
    encoder: Part | None = Field(None, description="image encoder whose grid cells become regions; unset = model.options.image")
    boxes: str | None = Field(
        None, description="JSON lines of a detector: each box gets the mean of the cells under it; unset = every cell is a region"
    )
    keep_images: bool = Field(True, description="keep the photos beside their regions, for reports, searches and image teachers")
    batch_size: int = Field(32, ge=1, description="photos per call of the encoder")
    actors: int | None = Field(None, ge=1, description="processes that hold the encoder; unset = one for each GPU, or one without GPUs")


class Encoders(Strict):
    """How the encoders of a matcher learn, beside the rest of it."""

    freeze: list[Literal["image", "text"]] = Field(
        default_factory=list, description="encoders that do not learn, or not before unfreeze_step or unfreeze_epoch"
    )
    unfreeze_step: int | None = Field(None, ge=1, description="the first step (0-based) at which the encoders of freeze learn")
    unfreeze_epoch: int | None = Field(None, ge=1, description="the same in epochs: the first (0-based) in which they learn")
    encoder_rate: float = Field(1.0, gt=0, description="learning rate of the encoders as a multiple of lr, which all else has")
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="each layer of a Hugging Face encoder learns at this multiple of the rate of the layer above it, the embeddings last",
    )

    @model_validator(mode="after")
    def _check_freezing(self) -> Encoders:
        if self.unfreeze_step is not None and self.unfreeze_epoch is not None:
            raise ValueError("unfreeze_step and unfreeze_epoch say the same thing in two units: give one of them")
        if not self.freeze and (self.unfreeze_step or self.unfreeze_epoch):
            raise ValueError("unfreeze_step and unfreeze_epoch need freeze: [image], [text] or both")
        return self
