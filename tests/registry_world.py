"""Tiny matchers and pictures, for the tests of registry, pyfunc, register and search."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from itm.config import Part, Text
from itm.data.preprocess import ImageInput, Inputs
from itm.data.text import build_tokenizer
from itm.folder import build_matcher, save_matcher

TEXTS = ["a red circle", "a blue square", "a green circle left of a red square"]


def picture(colour: str, size: int = 32) -> bytes:
    """PNG bytes of a disc."""
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).ellipse((4, 4, size - 4, size - 4), fill=colour)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def tiny_matcher(seed: int = 0, part: Part | None = None):
    torch.manual_seed(seed)
    options = {"image": {"kind": "conv", "image_size": 32, "hidden": 16}, "text": {"kind": "pooled_gru"}, "width": 8}
    inputs = Inputs(ImageInput(size=32, crop="squash"), build_tokenizer(Text(), TEXTS))
    return build_matcher(part or Part(kind="dual", options=options), inputs).eval()


def matcher_folder(folder: Path, seed: int = 0, part: Part | None = None) -> Path:
    save_matcher(tiny_matcher(seed, part), folder)
    return folder
