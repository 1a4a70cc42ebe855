"""A Hugging Face model of two towers as a matcher: its own scores, whole or in part trained, saved without its path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import itm
from itm.config import Part
from itm.importers.hub import is_hub, load_hub
from itm.matchers.folder import build_matcher, save_matcher
from itm.matchers.hf_dual import HFDual
from tests.support.hub_models import LONGEST, SIDE, tiny
from tests.support.noise_split import png

TEXTS = ["a red thing", "b", "two blue squares above"]
KINDS = pytest.mark.parametrize("kind", ["clip", "siglip"])


@KINDS
def test_the_scores_are_those_of_the_model_itself(kind: str, tmp_path: Path) -> None:
    theirs = tiny(tmp_path / "hf", kind)
    ours = itm.load_matcher(tmp_path / "hf")
    images, captions = ours.inputs.images([png(n) for n in range(3)]), ours.inputs.captions(TEXTS)
    words = ours.inputs.tokenizer.hf
    padding = {"padding": "max_length", "max_length": LONGEST} if kind == "siglip" else {"padding": True}
    given = words(TEXTS, return_tensors="pt", **padding)
    mask = {} if kind == "siglip" else {"attention_mask": given["attention_mask"]}
    pixels = (images.pixels / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    with torch.no_grad():
        out = theirs(input_ids=given["input_ids"], pixel_values=pixels, **mask)
        scores = ours.score(ours.encode_images(images), ours.encode_captions(captions))
    bias = theirs.logit_bias if kind == "siglip" else 0
    torch.testing.assert_close(scores, (out.logits_per_image - bias) / theirs.logit_scale.exp(), atol=1e-5, rtol=1e-5)
    assert ours.inputs.image.crop == ("center" if kind == "clip" else "squash")


@KINDS
def test_a_saved_folder_needs_the_path_no_more(kind: str, tmp_path: Path) -> None:
    tiny(tmp_path / "hf", kind)
    before = load_hub(str(tmp_path / "hf"))
    save_matcher(before, tmp_path / "matcher")
    for path in (tmp_path / "hf").iterdir():
        path.unlink()
    after = itm.load_matcher(tmp_path / "matcher")
    images = before.inputs.images([png(1)])
    torch.testing.assert_close(after.encode_images(images).vector, before.encode_images(images).vector)


def fresh(folder: Path, **options: object) -> HFDual:
    inputs = load_hub(str(folder)).inputs
    matcher = build_matcher(Part(kind="hf_dual", options={"path": str(folder), **options}), inputs)
    assert isinstance(matcher, HFDual)
    return matcher


def trained(matcher: HFDual) -> set[str]:
    """The parts whose weights a step changes."""
    matcher.train()
    images, captions = matcher.inputs.images([png(n) for n in range(3)]), matcher.inputs.captions(TEXTS)
    optimizer = torch.optim.SGD([p for p in matcher.parameters() if p.requires_grad], 0.1)
    before = {name: p.detach().clone() for name, p in matcher.named_parameters()}
    for _ in range(2):  # the second matrix of an adapter begins at zero, so the first learns from the second step on
        optimizer.zero_grad()
        matcher.score(matcher.encode_images(images), matcher.encode_captions(captions)).diag().sum().backward()
        optimizer.step()
    return {name for name, p in matcher.named_parameters() if not torch.equal(p, before[name])}


def test_heads_on_frozen_towers_learn_alone(tmp_path: Path) -> None:
    tiny(tmp_path, "clip")
    changed = trained(fresh(tmp_path, freeze=True, heads={"cross": True}))
    assert changed
    assert all(name.startswith(("image_heads.", "text_heads.")) for name in changed)
    assert any(name.startswith("backbone.") for name in trained(fresh(tmp_path)))


def test_adapters_learn_in_place_of_the_towers_and_are_saved(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the extra lora is not installed")
    tiny(tmp_path / "hf", "clip")
    matcher = fresh(tmp_path / "hf", lora={"rank": 2})
    changed = trained(matcher)
    assert changed
    assert all("lora_" in name for name in changed)
    save_matcher(matcher.eval(), tmp_path / "matcher")
    images = matcher.inputs.images([png(1)])
    torch.testing.assert_close(itm.load_matcher(tmp_path / "matcher").encode_images(images).vector, matcher.encode_images(images).vector)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    tiny(tmp_path / "hf", "clip")
    with pytest.raises(ValueError, match="no option 'frozen'"):
        fresh(tmp_path / "hf", frozen=True)
    matcher = load_hub(str(tmp_path / "hf"))
    with pytest.raises(ValueError, match=f"data.image_size={SIDE}"):
        matcher.encode_images(
            matcher.inputs.images([png(1)]).__class__(torch.arange(1), pixels=torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
        )
    with pytest.raises(ValueError, match="is no matcher folder and no Hugging Face model"):
        itm.load_matcher("nobody/no-such-model")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is a bert, not a model of an image and a text tower"):
        itm.load_matcher(tmp_path / "bert")


def test_only_hub_names_and_folders_of_hugging_face_lead_there(tmp_path: Path) -> None:
    tiny(tmp_path / "hf", "clip")
    assert is_hub(str(tmp_path / "hf"))
    assert is_hub("openai/clip-vit-base-patch32")
    assert not any(map(is_hub, (str(tmp_path), "runs/demo/demo/matcher", str(tmp_path / "nothing"))))
