"""Heads that CUSA trains for a matcher without its own are saved, loaded and applied with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import itm
from itm.data.preprocess import ImageInput, Inputs
from itm.data.text import SPECIAL, WordVocabulary
from itm.matchers.folder import save_matcher, take_weights
from itm.matchers.late.scan import SCAN
from itm.matchers.uni_heads import UniHeads, give_heads, heads_of
from itm.matchers.weights import weights_hash
from itm.methods.cusa import CUSA
from itm.methods.matching import Matching
from itm.types import Encoded, Images, Matcher
from tests.support.every_matcher import POSITIONS, SCAN_TOWERS, WORDS, batch_of, captions_of, images_of, matcher_of

WIDTHS = {"scan": 10, "sgr": 10, "saf": 10, "uarda": 10, "uniter": 16, "vse": 8}


def trained(kind: str, **usa: Any) -> CUSA:
    """A method whose heads and matcher have moved from where they began."""
    width = {"width": 16} if kind == "uniter" else {}
    method = CUSA(matcher_of(kind).train(), triplet={"margin": 0.2}, csa=False, usa={"weight": 5.0, "teacher": 1.0, **width, **usa}).train()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        torch.stack(list(method(batch_of(6)).values())).sum().backward()
        optimizer.step()
    return method.eval()


def saved(method: CUSA, folder: Path) -> Path:
    words = [*SPECIAL, "a", "dog", *(f"word{n}" for n in range(WORDS - len(SPECIAL) - 2))]
    tokenizer = WordVocabulary({word: n for n, word in enumerate(words)}, max_length=POSITIONS)
    with method.serving() as matcher:
        matcher.inputs = Inputs(ImageInput(kind="regions", max_regions=4), tokenizer)
        save_matcher(matcher, folder)
    return folder


def read_by_hand(matcher: Any, encoded: Any, side: str) -> Tensor:
    """What a head reads: of SGR and SAF the global vector, else the vector, else the mean of the real parts."""
    if hasattr(matcher, "v_global_w"):
        return (matcher.v_global_w if side == "image" else matcher.t_global_w)(encoded.parts, encoded.mask)
    if encoded.vector is not None:
        return encoded.vector
    rows = zip(encoded.parts, encoded.mask, strict=True)
    return torch.stack([parts[mask].mean(0) for parts, mask in rows])


@pytest.mark.parametrize("kind", WIDTHS)
def test_a_loaded_matcher_encodes_with_the_heads_as_they_were_trained(kind: str, tmp_path: Path) -> None:
    method = trained(kind)
    assert heads_of(method.matcher) is None, "in training they are the method's"
    again = itm.load_matcher(saved(method, tmp_path / "m"))
    kept = load_file(tmp_path / "m" / "model.safetensors")
    with torch.no_grad():
        for side, encoded in (("image", again.encode_images(images_of(5))), ("text", again.encode_captions(captions_of([3, 5, 4])))):
            weight, bias = kept[f"uni_heads.{side}.weight"], kept[f"uni_heads.{side}.bias"]
            assert torch.equal(weight, method.uni_heads[side].weight)
            by_hand = read_by_hand(again, encoded, side) @ weight.T + bias
            torch.testing.assert_close(encoded.uni, by_hand / by_hand.norm(dim=1, keepdim=True))
    assert again.uni_width == WIDTHS[kind]


@pytest.mark.parametrize("head", ["norm_linear", "none"])
def test_every_kind_of_head_comes_back_as_the_method_applied_it(head: str, tmp_path: Path) -> None:
    method = trained("saf", head=head)
    again = itm.load_matcher(saved(method, tmp_path / "m"))
    with torch.no_grad():
        images = method.matcher.encode_images(images_of(5))
        assert images.uni is None
        wanted = method.uni_heads["image"](method.matcher.v_global_w(images.parts, images.mask))
        torch.testing.assert_close(again.encode_images(images_of(5)).uni, F.normalize(wanted, dim=1))
    bare = itm.load_matcher(tmp_path / "m")
    give_heads(bare, None)
    assert bare.encode_images(images_of(5)).uni is None
    assert weights_hash(bare) != weights_hash(again)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["format"] == 2
    save_matcher(bare, tmp_path / "bare")
    assert json.loads((tmp_path / "bare" / "config.json").read_text())["format"] == 1


def test_a_user_s_own_subclass_of_a_matcher_has_its_heads_applied_once(tmp_path: Path) -> None:
    calls: list[str] = []

    class Counting(UniHeads):
        def forward(self, matcher: Matcher, encoded: Encoded, side: str) -> Tensor:
            calls.append(side)
            return super().forward(matcher, encoded, side)

    class Own(SCAN):
        def encode_images(self, images: Images) -> Encoded:
            return super().encode_images(images)

    matcher = Own(vocab_size=WORDS, **SCAN_TOWERS).eval()
    give_heads(matcher, Counting("linear", 10))
    assert matcher.encode_images(images_of(2)).uni is not None
    assert matcher.encode_captions(captions_of([3])).uni is not None
    assert calls == ["image", "text"]
    matcher.train().encode_images(images_of(2))
    assert calls == ["image", "text"]


def test_a_run_goes_on_from_the_heads_of_the_matcher_it_starts_from_and_one_that_trains_none_leaves_them(tmp_path: Path) -> None:
    method, triplet = trained("scan"), {"triplet": {"margin": 0.2}, "csa": False}
    folder = str(saved(method, tmp_path / "m"))
    tuned = matcher_of("scan")
    take_weights(tuned, folder)
    further = CUSA(tuned, **triplet, usa={"teacher": 1.0})
    assert torch.equal(further.uni_heads["text"].weight, method.uni_heads["text"].weight)
    assert heads_of(tuned) is None
    take_weights(tuned, folder)
    with pytest.raises(ValueError, match="has uni heads 'linear' of width 10, usa asks for 'norm_linear' of width 10: set usa.head=linear"):
        CUSA(tuned, **triplet, usa={"teacher": 1.0, "head": "norm_linear"})
    take_weights(tuned, folder)
    with Matching(tuned, loss="triplet").serving() as kept:
        assert kept is tuned
    assert CUSA(tuned, **triplet, usa=False).uni_heads is None
    assert heads_of(tuned) is None


def test_heads_of_an_unknown_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="linear, norm_linear or none, not 'mlp'"):
        UniHeads("mlp", 4)  # type: ignore[arg-type]
