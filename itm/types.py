"""The nouns of image-text matching, with their shapes. Everything else in `itm` speaks these types.

B, I, T, N = rows (batch, images, captions, either)   R = regions   L = tokens   K = parts   D = width   H, W = pixels
`image_id` is an int64 that is equal for rows of one image, and says no more; string ids stay in the rows.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from itm.rows import Rows

Options = dict[str, Any]
"""Keyword arguments of a part: plain values that JSON holds, as a recipe and a config.json have them."""


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


class Prepared(nn.Module):
    """A module that carries the preparation of what it reads."""

    _inputs: MatcherInputs | None = None

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


class Matcher(Prepared):
    """Encode, encode, score. A kind of matcher subclasses this; whatever is asked of a matcher from outside is declared here.

    `encode_images`, `encode_captions` and `score` must be given, and `options`, from which `type(matcher)(vocab_size=..., **options)`
    builds the same architecture. All else has a default that is right for a matcher without that ability. A larger score: a better match.
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
        """A matcher of a user's own that names no kind is known by its import path; what it encodes holds what attached heads give."""
        super().__init_subclass__(**given)
        if "kind" not in vars(cls):
            cls.kind = f"{cls.__module__}:{cls.__qualname__}"
        for name, side in (("encode_images", "image"), ("encode_captions", "text")):
            if name in vars(cls):
                setattr(cls, name, _with_uni(vars(cls)[name], side))

    options: Options
    vector_width: int = 0
    """Width of `Encoded.vector`; 0 = it is not known."""
    uni_width: int = 0
    """Width of `Encoded.uni`; 0 = there is no uni-modal head."""
    uni_heads: nn.Module | None
    """Heads that a method trained for a matcher without its own (`itm.matchers.uni_heads`): outside of training `encode_images` and
    `encode_captions` add what they give, from (matcher, encoded, side), as `Encoded.uni`."""
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

    def __init__(self) -> None:
        super().__init__()
        self.uni_heads = None  # not of the class, where it would hide the module

    def encode_images(self, images: Images) -> Encoded:
        raise NotImplementedError(f"{type(self).__name__} does not say how it encodes images")

    def encode_captions(self, captions: Captions) -> Encoded:
        raise NotImplementedError(f"{type(self).__name__} does not say how it encodes captions")

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        """(I,T) scores, images in rows."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it scores")

    def training_scores(self, images: Encoded, captions: Encoded) -> Sequence[Tensor]:
        """Matrices (I,T) whose ranking losses a method adds up: the score, but for a matcher that trains several scores at once."""
        return [self.score(images, captions)]

    def split_score(self, images: Encoded, captions: Encoded) -> SplitScore | None:
        """In the place of `score` where a loss reaches few pairs. None where pairs depend on each other, or it would save nothing."""
        return None

    def cuts_tiles(self, captions: Encoded) -> bool:
        """Whether `score` cuts its own tiles and builds nothing as large as all pairs."""
        return False

    def training_terms(self, scores: Tensor, positives: Tensor, rows: int) -> dict[str, Tensor]:
        """Losses that the matcher adds, and what it learns from a step besides gradients; called once after each `score` in training.

        scores: what `score` gave (I,T); positives (I,T) bool; rows: images of this rank among the I, fewer where ranks gather.
        """
        return {}

    def whole(self, encoded: Encoded, side: str) -> Tensor | None:
        """(N,D) the vector of a whole image or caption that the matcher makes of its parts; None = it makes none. side: image or text."""
        return None

    @property
    def averaged(self) -> Sequence[Matcher]:
        """The matchers whose mean score this one gives: itself alone, for all but a mean."""
        return (self,)

    def layers(self) -> list[nn.Module]:
        """The modules that hold most weights and activations: encoders, and layers of a joint encoder. They are compiled, run again in
        the backward pass and sharded one by one, so each is called as a module, and its weights are read inside that call only."""
        return []

    def encoders(self) -> dict[str, nn.Module]:
        """The encoders that can be frozen or learn at rates of their own (train.freeze): `image`, `text`, or none."""
        return {}

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


def _with_uni(encode: Callable[[Any, Any], Encoded], side: str) -> Callable[[Any, Any], Encoded]:
    """`encode` of a matcher's class, then its uni heads; once, where a subclass calls the `encode` of its base."""

    @functools.wraps(encode)
    def whole(matcher: Matcher, rows: Any) -> Encoded:
        encoded = encode(matcher, rows)
        if matcher.uni_heads is None or matcher.training or getattr(type(matcher), encode.__name__) is not whole:
            return encoded
        return replace(encoded, uni=matcher.uni_heads(matcher, encoded, side)).moved_from(encoded)

    return whole


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

    @contextmanager
    def serving(self) -> Iterator[Matcher]:
        """The matcher as it is kept, registered and served: with those layers of the method that belong to what it gives."""
        yield self.matcher


def positives_from_ids(image_ids: Tensor, caption_image_ids: Tensor) -> Tensor:
    """(I,T) bool: caption t describes image i. image_ids (I,), caption_image_ids (T,), both integer."""
    return image_ids[:, None] == caption_image_ids[None, :]
