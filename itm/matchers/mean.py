"""The mean of matchers as one matcher: its score is the mean of theirs, as the ensembles of the papers have it (SGRAF = SGR and SAF).

Its folder holds all weights, so nothing outside of it is needed. `score_matrix` and what stands on it score each member by itself, in its
own tiles; the numbers are those of the members' score matrices added up and divided.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from itm.data.preprocess import ImageInput, Inputs
from itm.kinds import build_part
from itm.matchers import MATCHERS
from itm.matchers.uni_heads import UniHeads, give_heads, heads_of
from itm.types import Captions, Encoded, Images, Matcher, MatcherInputs, Options


class Mean(Matcher):
    """`members`: of each its `kind` and `options`, and its `uni_heads` where it has some, as their config.json have them.

    `Encoded.each` holds what the members made. `vector` (and `uni`, where a member has uni-modal heads) is such that its cosine is the mean
    of the members' cosines: their unit vectors beside each other. It is None where a member has none.
    """

    kind: ClassVar[str] = "mean"

    def __init__(self, *, vocab_size: int, members: list[Options]) -> None:
        """Raises ValueError for fewer than two members, and for a member that is a mean itself."""
        super().__init__()
        self.members = nn.ModuleList(_built(n, said, vocab_size) for n, said in enumerate(members, 1))
        _check_members([said["kind"] for said in members])
        self.options = {"members": [_said(member) for member in self.averaged]}
        self.vector_width = sum(member.vector_width for member in self.averaged)

    @classmethod
    def of(cls, matchers: Sequence[Matcher], names: Sequence[str] = ()) -> Mean:
        """The mean of matchers that are there, with their inputs; it shares their weights.

        names: of the matchers, for messages. Raises ValueError as `check_same_data`, and as the constructor.
        """
        _check_members([matcher.kind for matcher in matchers], names)
        check_same_data(matchers, names)
        mean = cls.__new__(cls)
        Matcher.__init__(mean)
        mean.members = nn.ModuleList(matchers)
        mean.options = {"members": [_said(matcher) for matcher in matchers]}
        mean.vector_width = sum(matcher.vector_width for matcher in matchers)
        mean.inputs = joined_inputs(matchers)
        return mean.eval()

    @property
    def averaged(self) -> list[Matcher]:
        return [member for member in self.members if isinstance(member, Matcher)]

    @property
    def inputs(self) -> MatcherInputs:
        return super().inputs

    @inputs.setter
    def inputs(self, inputs: MatcherInputs) -> None:
        self._inputs = copy.copy(inputs)
        own = inputs.each if isinstance(inputs, MeanInputs) else [inputs] * len(self.members)
        for member, given in zip(self.averaged, own, strict=True):
            member.inputs = given

    def layers(self) -> list[nn.Module]:
        return [layer for member in self.averaged for layer in member.layers()]

    def encode_images(self, images: Images) -> Encoded:
        """Raises ValueError for images that are not prepared for each member, where the members prepare them differently."""
        if not images.each and isinstance(self._inputs, MeanInputs):
            raise ValueError("the members of this mean prepare images each in its own way: give what matcher.inputs.images makes of them")
        return beside([member.encode_images(own) for member, own in zip(self.averaged, self._each(images), strict=True)])

    def encode_captions(self, captions: Captions) -> Encoded:
        return beside([member.encode_captions(own) for member, own in zip(self.averaged, self._each(captions), strict=True)])

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        """(I,T), the mean of the members' scores."""
        rows = zip(self.averaged, images.each, captions.each, strict=True)
        return torch.stack([member.score(left, right) for member, left, right in rows]).mean(0)

    def attention(self, images: Encoded, captions: Encoded) -> Tensor | None:
        """That of the first member that attends."""
        for member, left, right in zip(self.averaged, images.each, captions.each, strict=True):
            if (found := member.attention(left, right)) is not None:
                return found
        return None

    def _each(self, rows: Any) -> Sequence[Any]:
        return rows.each or [rows] * len(self.members)


def beside(encoded: Sequence[Encoded]) -> Encoded:
    """The encoding of a mean, of its members' encodings of the same rows."""
    vectors = [own.vector for own in encoded]
    compared = [own.vector if own.uni is None else own.uni for own in encoded]
    uni = _beside(compared) if any(own.uni is not None for own in encoded) else None
    return Encoded(vector=_beside(vectors), uni=uni, each=tuple(encoded))


def _beside(vectors: Sequence[Tensor | None]) -> Tensor | None:
    """(N, sum of widths) unit rows whose products are the mean of the cosines; None where one is missing."""
    there = [F.normalize(vector.float(), dim=1) for vector in vectors if vector is not None]
    return torch.cat(there, 1) / len(there) ** 0.5 if len(there) == len(vectors) else None


def _built(number: int, said: Options, vocab_size: int) -> Matcher:
    if not {"kind", "options"} <= set(said) <= {"kind", "options", "uni_heads"}:
        raise ValueError(f"member {number} of a mean has kind and options (and uni_heads), not {', '.join(map(str, said)) or 'nothing'}")
    member = build_part(MATCHERS, said["kind"], said["options"], f"member {number} of the mean", vocab_size=vocab_size)
    if "uni_heads" in said:
        give_heads(member, UniHeads(**said["uni_heads"]))
    return member


def _said(member: Matcher) -> Options:
    heads = heads_of(member)
    return {"kind": member.kind, "options": member.options} | ({"uni_heads": heads.options} if heads else {})


def _check_members(kinds: Sequence[str], names: Sequence[str] = ()) -> None:
    if len(kinds) < 2:
        raise ValueError(f"a mean has at least two members, not {len(kinds)}")
    for number, kind in enumerate(kinds):
        if kind == Mean.kind:
            what = names[number] if names else f"member {number + 1}"
            raise ValueError(f"{what} is a mean itself, whose members would weigh less than the others: name them one by one")


# --- what the members read --------------------------------------------------------------------------------------------------------------


def check_same_data(matchers: Sequence[Matcher], names: Sequence[str] = ()) -> None:
    """Raises ValueError, naming both, where two matchers read other data: pixels and regions, regions of other widths, other words."""
    called = list(names) or [f"member {n}" for n in range(1, len(matchers) + 1)]
    first, words = matchers[0], _words(matchers[0])
    for name, other in zip(called[1:], matchers[1:], strict=True):
        pair = f"{called[0]} and {name} read other data and make no ensemble"
        kinds = first.inputs.image.kind, other.inputs.image.kind
        if kinds[0] != kinds[1]:
            raise ValueError(f"{pair}: the first reads {kinds[0]}, the second {kinds[1]}; name matchers that read the same")
        widths = _region_width(first), _region_width(other)
        if kinds[0] == "regions" and None not in widths and widths[0] != widths[1]:
            raise ValueError(f"{pair}: their regions are {widths[0]} and {widths[1]} wide; name matchers of the same features")
        if words != (found := _words(other)):
            differ = next(name for name in sorted(words | found) if words.get(name) != found.get(name))
            raise ValueError(f"{pair}: their tokenizers differ ({differ}); train both with one vocabulary (text.path) and one clean-up")


def joined_inputs(matchers: Sequence[Matcher]) -> MatcherInputs:
    """One preparation for all where they prepare images alike (a width that one of them checks is checked for all), else one for each."""
    said = [matcher.inputs.image.said() for matcher in matchers]
    widths = [own.pop("region_width", None) for own in said]
    if all(own == said[0] for own in said):
        return matchers[next((n for n, width in enumerate(widths) if width), 0)].inputs
    return MeanInputs([matcher.inputs for matcher in matchers])


def one_by_one(matchers: Sequence[Matcher], names: Sequence[str] = ()) -> list[Matcher]:
    """The members of an ensemble: those of the mean where one is given, else the matchers. Raises ValueError as `Mean.of`."""
    if len(matchers) == 1:
        return list(matchers[0].averaged)
    _check_members([matcher.kind for matcher in matchers], names)
    check_same_data(matchers, names)
    return list(matchers)


def _region_width(matcher: Matcher) -> int | None:
    said = matcher.inputs.image.said().get("region_width")
    image = matcher.options.get("image") or {}
    return said or image.get("in_width") or matcher.options.get("region_dim")


def _words(matcher: Matcher) -> dict[str, bytes]:
    """The files of the tokenizer, by name."""
    with tempfile.TemporaryDirectory() as folder:
        matcher.inputs.save(folder)
        kept = Path(folder) / "tokenizer"
        return {str(path.relative_to(kept)): path.read_bytes() for path in kept.rglob("*") if path.is_file()}


class MeanInputs:
    """The preparation of members that see images in ways of their own (sizes, crops, numbers of regions) and captions in the same way."""

    def __init__(self, each: Sequence[MatcherInputs]) -> None:
        self.each = list(each)

    def __copy__(self) -> MeanInputs:
        return MeanInputs([copy.copy(own) for own in self.each])

    @property
    def target(self) -> torch.device:
        return self.each[0].target

    @target.setter
    def target(self, device: torch.device) -> None:
        for own in self.each:
            own.target = device

    @property
    def image(self) -> Any:
        return self.each[0].image

    @property
    def tokenizer(self) -> Any:
        return self.each[0].tokenizer

    def images(self, raw: Sequence[bytes], image_id: Sequence[int] | None = None) -> Images:
        each = [own.images(raw, image_id) for own in self.each]
        return replace(each[0], each=tuple(each))

    def captions(self, texts: Sequence[str], image_id: Sequence[int] | None = None) -> Captions:
        return self.each[0].captions(texts, image_id)

    def save(self, folder: str | Path) -> None:
        """As the inputs of the first, and `members.json` with what each makes of an image."""
        self.each[0].save(folder)
        (Path(folder) / MEMBERS).write_text(json.dumps({"images": [own.image.said() for own in self.each]}, indent=1))


MEMBERS = "members.json"


def load_inputs(folder: str | Path) -> MatcherInputs:
    """What `save` of the inputs of any matcher wrote. Raises ValueError as `Inputs.load`."""
    inputs, members = Inputs.load(folder), Path(folder) / MEMBERS
    if not members.exists():
        return inputs
    said = json.loads(members.read_text())["images"]
    return MeanInputs([Inputs(ImageInput(**image), inputs.tokenizer) for image in said])
