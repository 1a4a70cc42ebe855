"""The nouns of image-text matching, with their shapes. Everything else in `itm` speaks these types.

B, I, T, N = rows (batch, images, captions, either)   R = regions   L = tokens   K = parts   D = width   H, W = pixels
`image_id` is an int64 that is equal for rows of one image, and says no more; string ids stay in the rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

Options = dict[str, Any]
"""Keyword arguments of a part: plain values that JSON holds, as a recipe and a config.json have them."""


@dataclass(frozen=True)
class Rows:
    """Tensors that share their first axis. A missing field is None.

    Rows on a GPU remember those in main memory that they were moved from: what must be known of them, such as lengths, is read from
    `host`, and the host does not wait for the device.
    """

    @property
    def host(self) -> Self:
        """The same rows in main memory, without large fields; what was not moved from there is copied, which waits."""
        twin: Self | None = self.__dict__.get("_host")
        return self.light().to("cpu") if twin is None else twin

    def light(self) -> Self:
        """Without fields that a device should rather hold alone."""
        return self

    def moved_from(self, here: Self) -> Self:
        """The same rows, which lie elsewhere, with `here` as what is known of them in main memory."""
        if here.host_known and not self.host_known:
            object.__setattr__(self, "_host", here.host)
        return self

    @property
    def host_known(self) -> bool:
        """Whether `host` costs nothing."""
        return "_host" in self.__dict__ or all(value.device.type == "cpu" for value in self.present().values())

    def present(self) -> dict[str, Tensor]:
        """The fields that are set, by name."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}

    def __len__(self) -> int:
        return len(next(iter(self.present().values())))

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """The chosen rows: a slice, an index tensor or a bool mask."""
        chosen = replace(self, **{name: value[rows] for name, value in self.present().items()})
        known = "_host" in self.__dict__ and (isinstance(rows, slice) or rows.device.type == "cpu")
        return chosen.moved_from(self.host[rows]) if known else chosen

    def to(self, target: torch.device | torch.dtype | str, non_blocking: bool = False) -> Self:
        """Move (or cast) every tensor, as `Tensor.to`."""
        moved = replace(self, **{name: value.to(target, non_blocking=non_blocking) for name, value in self.present().items()})
        return moved.moved_from(self)

    @classmethod
    def cat(cls, pieces: Sequence[Self]) -> Self:
        """Stack pieces along the rows. Ragged second axes (parts, tokens and their masks) are zero-padded to the longest."""
        if not pieces:
            raise ValueError(f"cannot stack zero pieces of {cls.__name__}")
        names = pieces[0].present()
        return replace(pieces[0], **{name: _cat([p.present()[name] for p in pieces]) for name in names})


def _cat(values: list[Tensor]) -> Tensor:
    if values[0].dim() > 1 and len({v.shape[1] for v in values}) > 1:
        longest = max(v.shape[1] for v in values)
        values = [torch.cat([v, v.new_zeros(v.shape[0], longest - v.shape[1], *v.shape[2:])], 1) for v in values]
    return torch.cat(values)


@dataclass(frozen=True)
class Images(Rows):
    """Images as pixels or as precomputed regions (or both).

    image_id (B,) int64; pixels (B,3,H,W) uint8, RGB, not normalised (the image encoder normalises on its device);
    regions (B,R,Dv) float; boxes (B,R,7) float, x1 y1 x2 y2 w h w*h in [0,1]; mask (B,R) bool, True = real region.
    """

    image_id: Tensor
    pixels: Tensor | None = None
    regions: Tensor | None = None
    boxes: Tensor | None = None
    mask: Tensor | None = None

    def light(self) -> Images:
        return Images(self.image_id, mask=self.mask)


@dataclass(frozen=True)
class Captions(Rows):
    """Token ids. tokens (B,L) int64; mask (B,L) bool, True = real token; image_id (B,) int64 = the image it describes."""

    tokens: Tensor
    mask: Tensor
    image_id: Tensor


@dataclass(frozen=True)
class SoftLabels(Rows):
    """Teacher vectors of the pairs of a batch: image (B,S1), text (B,S2), float. B x B targets are formed in the method."""

    image: Tensor | None = None
    text: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """What a method trains on. Usually row k of `images` and of `captions` belong together, but ids decide."""

    images: Images
    captions: Captions
    teacher: SoftLabels | None = None

    def to(self, device: torch.device | str) -> Batch:
        teacher = None if self.teacher is None else self.teacher.to(device)
        return Batch(self.images.to(device), self.captions.to(device), teacher)


@dataclass(frozen=True)
class Encoded(Rows):
    """What an encoder gives and `score` needs.

    vector (N,D): one vector per row (dual encoders: L2-normalised; late interaction: the global mean vector);
    parts (N,K,D) with mask (N,K) bool: regions, patches or words; uni (N,U): the uni-modal head of CUSA, L2-normalised.
    """

    vector: Tensor | None = None
    parts: Tensor | None = None
    mask: Tensor | None = None
    uni: Tensor | None = None

    def light(self) -> Encoded:
        return Encoded(mask=self.mask)


@dataclass(frozen=True)
class Relations:
    """Attention blocks of G pairs, each normalised over itself, head mean, zero on padding.

    blocks = LL (G,n,n), VV (G,m,m), LV (G,n,m), VL (G,m,n); word_mask (G,n), region_mask (G,m) bool;
    logits = the scaled raw products (G,h,n,n) among words and (G,h,m,m) among regions.
    """

    blocks: tuple[Tensor, Tensor, Tensor, Tensor]
    word_mask: Tensor
    region_mask: Tensor
    logits: tuple[Tensor, Tensor]

    @classmethod
    def cat(cls, pieces: Sequence[Relations]) -> Relations:
        """Stack pairs; all pieces are padded to one number of words and one of regions."""
        ll, vv, lv, vl = (torch.cat(blocks) for blocks in zip(*(p.blocks for p in pieces), strict=True))
        words, regions = (torch.cat(products) for products in zip(*(p.logits for p in pieces), strict=True))
        masks = torch.cat([p.word_mask for p in pieces]), torch.cat([p.region_mask for p in pieces])
        return cls((ll, vv, lv, vl), *masks, (words, regions))


@dataclass(frozen=True)
class Pairs:
    """scores (N,) of row-aligned pairs, and the relation blocks of the rows asked for (None when none were)."""

    scores: Tensor
    relations: Relations | None = None


class SplitScore(NamedTuple):
    """`Matcher.score` in two passes: scores (I,T) without gradient, and of_pairs(image rows (P,), caption rows (P,)) -> (P,) with it."""

    scores: Tensor
    of_pairs: Callable[[Tensor, Tensor], Tensor]


class ImageForm(Protocol):
    """What a matcher sees of an image; `itm.data.preprocess.ImageInput` is the one there is."""

    @property
    def kind(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def crop(self) -> str: ...

    @property
    def exif(self) -> bool: ...

    def said(self) -> Options: ...


class Tokenizer(Protocol):
    """How captions become token ids: (N,L) int64 and their mask (N,L) bool. clean: they are cleaned up first."""

    clean: bool

    @property
    def vocab_size(self) -> int: ...

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]: ...


class MatcherInputs(Protocol):
    """The preparation that travels with a matcher: raw images and texts become its inputs, on `target`.

    `itm.data.preprocess.Inputs` is the one there is.
    """

    target: torch.device

    @property
    def image(self) -> ImageForm: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def images(self, raw: Sequence[bytes], image_id: Sequence[int] | None = None) -> Images: ...

    def captions(self, texts: Sequence[str], image_id: Sequence[int] | None = None) -> Captions: ...

    def save(self, folder: str | Path) -> None: ...


@runtime_checkable
class Reports(Protocol):
    """A module with values that are worth a curve in training."""

    def report(self) -> dict[str, float]: ...


class Pruning(Protocol):
    """What makes a matcher skip what changes no score, and tells afterwards what it saw."""

    def report(self) -> dict[str, Any]: ...


class Matcher(nn.Module):
    """Encode, encode, score. A kind of matcher subclasses this; whatever is asked of a matcher from outside is declared here.

    `encode_images`, `encode_captions` and `score` must be given, and `options`, from which `type(matcher)(vocab_size=..., **options)`
    builds the same architecture. All else has a default that is right for a matcher without that ability. Larger scores mean a better
    match.
    """

    kind: ClassVar[str] = ""
    """The name in the table of matchers, and in config.json."""
    image_kind: ClassVar[str | None] = None
    """The image encoder that is built where the options name none."""
    joint: ClassVar[bool] = False
    """Every pair goes through one joint encoder: `pairs` works, and a score costs a forward pass."""
    prunes: ClassVar[bool] = False
    """Setting `pruning` has an effect."""

    def __init_subclass__(cls, **given: object) -> None:
        """A matcher of a user's own that names no kind is known by its import path."""
        super().__init_subclass__(**given)
        if "kind" not in vars(cls):
            cls.kind = f"{cls.__module__}:{cls.__qualname__}"

    options: Options
    vector_width: int = 0
    """Width of `Encoded.vector`; 0 = it is not known."""
    uni_width: int = 0
    """Width of `Encoded.uni`; 0 = there is no uni-modal head."""
    image_size: int | None = None
    """Pixels a side that the images must have; None = the matcher reads regions, or pixels of any size."""
    regions: int = 36
    """Regions an image that the data should keep (data.max_regions)."""
    pruning: Pruning | None = None
    recompute: bool = False
    """Run again in the backward pass what `score` computes in chunks, instead of keeping its activations."""
    keeps_whole: bool = False
    """A method sets this where it reads `whole` after `score`, which then keeps what it made of the same rows in training."""
    fuse_tiles: bool = False
    """Without gradient, run what `score` does to a tile as torch.compile makes it."""
    _inputs: MatcherInputs | None = None

    def encode_images(self, images: Images) -> Encoded:
        raise NotImplementedError(f"{type(self).__name__} does not say how it encodes images")

    def encode_captions(self, captions: Captions) -> Encoded:
        raise NotImplementedError(f"{type(self).__name__} does not say how it encodes captions")

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        """(I,T) scores, images in rows."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it scores")

    def split_score(self, images: Encoded, captions: Encoded) -> SplitScore | None:
        """In the place of `score` where a loss reaches few pairs. None where pairs depend on each other, or it would save nothing."""
        return None

    def cuts_tiles(self, captions: Encoded) -> bool:
        """Whether `score` cuts its own tiles and builds nothing as large as all pairs."""
        return False

    def training_terms(self, scores: Tensor, positives: Tensor, rows: int) -> dict[str, Tensor]:
        """Losses that the matcher adds, and what it learns from a step besides gradients. A method calls this once after each `score` in
        training.

        scores: what `score` gave (I,T); positives (I,T) bool; rows: images of this rank among the I, fewer where ranks gather.
        """
        return {}

    def whole(self, encoded: Encoded, side: str) -> Tensor | None:
        """(N,D) the vector of a whole image or caption that the matcher makes of its parts; None = it makes none. side: image or text."""
        return None

    def layers(self) -> list[nn.Module]:
        """The modules that hold most weights and activations: encoders, and layers of a joint encoder. They are compiled, run again in
        the backward pass and sharded one by one, so each is called as a module, and its weights are read inside that call only."""
        return []

    def pairs(self, images: Encoded, captions: Encoded, relations_of: Tensor | None = None) -> Pairs:
        """Row-aligned pairs of a joint matcher: scores (N,), and the relation blocks of the rows `relations_of` (G,) int64."""
        raise ValueError(f"{type(self).__name__} has no joint encoder, so pairs have no relations of their own: see `score`")

    def check_relations(self) -> None:
        """Raises ValueError, with the reason, when `relations` cannot serve."""
        if not self.joint:
            raise ValueError(
                f"IAIS needs relations among words and among regions, and {type(self).__name__} offers one vector a side: "
                "use uniter, a late-interaction matcher (scan, sgr, saf, uarda) or dual"
            )

    def relations(self, images: Images, captions: Captions) -> tuple[Encoded, Encoded, Relations]:
        """Row-aligned pairs (N): both encodings, and the relation blocks of every pair. Raises ValueError as `check_relations`."""
        self.check_relations()
        left, right = self.encode_images(images), self.encode_captions(captions)
        found = self.pairs(left, right, torch.arange(len(left), device=captions.tokens.device)).relations
        if found is None:
            raise ValueError(f"{type(self).__name__}.pairs gives no relation blocks, which a joint matcher must")
        return left, right, found

    def attention(self, images: Encoded, captions: Encoded) -> Tensor | None:
        """(N,L,K): for row-aligned pairs, the weight of each image part for each word; None where nothing attends."""
        return None

    @property
    def inputs(self) -> MatcherInputs:
        """How raw images and texts become inputs. Raises ValueError for a matcher that was made without."""
        if self._inputs is None:
            raise ValueError("this matcher was made without inputs; itm.load_matcher and build_matcher give them, or set matcher.inputs")
        return self._inputs

    @inputs.setter
    def inputs(self, inputs: MatcherInputs) -> None:
        self._inputs = copy.copy(inputs)  # its target is this matcher's own, and whoever gave it prepares where it did before

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `cuda` and `cpu` of this module or of one around it come to: the inputs follow the weights."""
        moved = super()._apply(fn, recurse)
        if self._inputs is not None:
            self._inputs.target = next((p.device for p in self.parameters()), self._inputs.target)
        return moved


class Method(nn.Module):
    """A way of training: owns a matcher, learnable temperatures (parameters) and running statistics (buffers)."""

    matcher: Matcher
    needs_teacher: tuple[str, ...] = ()
    """Modalities, of image and text, whose teacher vectors a batch must hold."""
    hardest_pairs: bool = True
    """Where a loss reaches few pairs, the others are scored without gradient (`train.hardest_pairs`)."""

    def forward(self, batch: Batch, step: int = 0, chunk: int | None = None) -> dict[str, Tensor]:
        """Weighted losses by name. step: optimiser steps taken; chunk: rows that are encoded at a time (`train.cache_chunk`)."""
        raise NotImplementedError


def positives_from_ids(image_ids: Tensor, caption_image_ids: Tensor) -> Tensor:
    """(I,T) bool: caption t describes image i. image_ids (I,), caption_image_ids (T,), both integer."""
    return image_ids[:, None] == caption_image_ids[None, :]
