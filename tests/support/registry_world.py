"""Tiny matchers and pictures, and servers on free ports, for the tests of registry, pyfunc, register, search and jobs."""

from __future__ import annotations

import io
import subprocess
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import itm
from itm.config import Part, Text
from itm.data.preprocess import ImageInput, Inputs
from itm.data.text import build_tokenizer
from itm.matchers.folder import build_matcher, save_matcher
from itm.tracking import registry

register_matcher = partial(registry.register_matcher, code=Path(itm.__file__).with_name("pyfunc.py"))
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


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise TimeoutError(f"{url} did not answer in {seconds} s\n{log.read_text()}")
