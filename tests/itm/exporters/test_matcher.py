"""A matcher that was exported scores as the one it was made from."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

from itm.config import Part
from itm.data.preprocess import ImageInput, Inputs
from itm.data.text import HFTokenizer, WordVocabulary
from itm.matchers.folder import build_matcher, save_matcher
from pipelines.cli import stage_main
from tests.support.every_matcher import CLIP_TOWERS, SCAN_TOWERS, captions_of, images_of

RESNET = {"layers": [1, 1, 1, 1], "width": 2, "heads": 2, "image_size": 32}
TEXTS = ["a red circle on the left", "blue", "two small green squares under a circle"]
WORDS = WordVocabulary.from_captions(TEXTS)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """CLIP's tokenizer without merges: a token a letter."""
    symbols = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("letters")
    CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=40).save_pretrained(folder)
    return HFTokenizer(folder, max_length=40, clean=False)


def saved(folder, kind, options, tokenizer, image=None):
    torch.manual_seed(3)
    matcher = build_matcher(Part(kind=kind, options=options), Inputs(image or ImageInput(size=16), tokenizer))
    for parameter in matcher.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_matcher(matcher.eval(), folder / "matcher")
    return matcher


def clip_options(tokenizer, **heads):
    text = {**CLIP_TOWERS["text_config"], "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 40}
    return {"config": {**CLIP_TOWERS, "text_config": {**text, "eos_token_id": tokenizer.hf.eos_token_id}}, "heads": heads}


def export(folder, form, output="out"):
    return stage_main("export", ["matcher", str(folder / "matcher"), "--to", form, "-o", str(folder / output)])


def photos():
    rng = np.random.default_rng(0)
    found = []
    for size in ((20, 30), (16, 16), (40, 25)):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(file, "PNG")
        found.append(file.getvalue())
    return found


def vectors(session, **given):
    return session.run(None, {name: tensor.numpy() for name, tensor in given.items()})[0]


@pytest.mark.parametrize("kind", ["dual of pixels", "dual of regions", "clip", "cusa on a resnet"])
def test_onnx_graphs_give_the_vectors_of_the_matcher_for_any_number_of_rows(kind, letters, tmp_path):
    ort = pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
    regions = {"image": {"kind": "regions", **SCAN_TOWERS["image"]}, "text": {"kind": "gru", **SCAN_TOWERS["text"]}, "width": 8}
    matcher = {
        "dual of pixels": lambda: saved(tmp_path, "dual", {"width": 8, "heads": {"uni": True}}, WORDS),
        "dual of regions": lambda: saved(tmp_path, "dual", regions, WORDS, ImageInput(kind="regions", max_regions=4)),
        "clip": lambda: saved(tmp_path, "clip", clip_options(letters), letters),
        "cusa on a resnet": lambda: saved(
            tmp_path, "clip", clip_options(letters, cross=True, uni=True) | {"resnet": RESNET}, letters, ImageInput(size=32)
        ),
    }[kind]()
    assert export(tmp_path, "onnx") == 0
    image, text = (ort.InferenceSession(str(tmp_path / "out" / f"{side}.onnx")) for side in ("image", "text"))
    for rows, tokens in ((1, [4]), (5, [3, 9, 4, 5, 6])):
        images, captions = images_of(rows), captions_of(tokens)
        images = replace(images, pixels=images.pixels.repeat(1, 1, 2, 2)) if "resnet" in kind else images
        given = {i.name: getattr(images, i.name) for i in image.get_inputs()}
        with torch.no_grad():
            assert np.abs(vectors(image, **given) - matcher.encode_images(images).vector.numpy()).max() < 1e-5
            got = vectors(text, tokens=captions.tokens % WORDS.vocab_size, mask=captions.mask)
            captions = type(captions)(captions.tokens % WORDS.vocab_size, captions.mask, captions.image_id)
            assert np.abs(got - matcher.encode_captions(captions).vector.numpy()).max() < 1e-5
    assert Inputs.load(tmp_path / "out").captions(TEXTS).tokens.equal(matcher.inputs.captions(TEXTS).tokens)


def test_transformers_loads_the_folder_of_a_clip_and_scores_as_it(letters, tmp_path):
    matcher = saved(tmp_path, "clip", clip_options(letters), letters)
    assert export(tmp_path, "huggingface") == 0
    model, processor = CLIPModel.from_pretrained(tmp_path / "out"), CLIPProcessor.from_pretrained(tmp_path / "out")
    opened = [Image.open(io.BytesIO(photo)) for photo in photos()]
    given = processor(images=opened, text=TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        there = model(**given)
        here = matcher.score(
            matcher.encode_images(matcher.inputs.images(photos())), matcher.encode_captions(matcher.inputs.captions(TEXTS))
        )
    assert torch.allclose(there.image_embeds @ there.text_embeds.T, here, atol=1e-5)
    assert here.std() > 0.01, "the vectors differ"


def test_what_a_form_cannot_hold_is_refused_and_leaves_nothing(letters, tmp_path, capsys):
    scan = tmp_path / "scan"
    saved(scan, "scan", SCAN_TOWERS, WORDS, ImageInput(kind="regions", max_regions=4))
    heads = tmp_path / "heads"
    saved(heads, "clip", clip_options(letters, cross=True), letters)
    pooled = tmp_path / "pooled"
    regions = {"image": {"kind": "regions", **SCAN_TOWERS["image"]}, "text": {"kind": "gru", **SCAN_TOWERS["text"]}, "width": 8}
    pooling = {"pooling": {"text": {"kind": "gpo"}}}
    saved(pooled, "dual", regions | pooling, WORDS, ImageInput(kind="regions", max_regions=4))
    for folder, form, said in (
        (pooled, "onnx", "text.onnx would differ from the matcher by inf where rows or lengths differ"),
        (scan, "onnx", "scan scores pairs by attention"),
        (scan, "huggingface", "transformers has no class for a scan matcher"),
        (heads, "huggingface", "cross heads, which CLIPModel has not: export it to onnx"),
    ):
        assert export(folder, form) == 2
        assert said in capsys.readouterr().err
        assert [p.name for p in folder.iterdir()] == ["matcher"]
    assert export(heads, "onnx") == 0
    assert export(heads, "onnx") == 2
    assert "is there already" in capsys.readouterr().err
