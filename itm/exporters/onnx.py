"""A matcher whose score is a cosine as two ONNX graphs, image.onnx and text.onnx, with its inputs.json and tokenizer/ beside them.

    image.onnx   pixels (n,3,S,S) uint8, or regions (n,K,D) float32 with mask (n,K) bool   -> vector (n,D) float32, unit length
    text.onnx    tokens (n,L) int64, mask (n,L) bool, as the tokenizer gives them           -> vector (n,D) float32, unit length

The score of an image and a caption is the product of their vectors. The number of rows and of tokens is free.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from itm.types import Captions, Images, Matcher

TOLERANCE = 1e-4


class _Side(nn.Module):
    """One side of a matcher from named tensors to its vectors."""

    def __init__(self, matcher: Matcher) -> None:
        super().__init__()
        self.matcher = matcher


class _Pixels(_Side):
    def forward(self, pixels: Tensor) -> Tensor | None:
        return self.matcher.encode_images(Images(torch.arange(pixels.shape[0]), pixels)).vector


class _Regions(_Side):
    def forward(self, regions: Tensor, mask: Tensor) -> Tensor | None:
        return self.matcher.encode_images(Images(torch.arange(regions.shape[0]), regions=regions, mask=mask)).vector


class _Text(_Side):
    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor | None:
        return self.matcher.encode_captions(Captions(tokens, mask, torch.arange(tokens.shape[0]))).vector


def write_onnx(matcher: Matcher, folder: Path) -> None:
    """Fill `folder`. Each graph is run once, with other numbers of rows than it was traced with, and compared with the matcher.

    Raises ValueError for a matcher whose score is no cosine of two vectors, and for one with a layer that a graph does not repeat.
    """
    if matcher.kind not in ("dual", "clip"):
        raise ValueError(f"{matcher.kind} scores pairs by attention, not by one vector a side: ONNX is for dual and clip")
    matcher = matcher.eval().cpu()
    side: _Side = _Pixels(matcher) if matcher.inputs.image.kind == "pixels" else _Regions(matcher)
    _write(side, _images(matcher, 2, 4), _images(matcher, 3, 5), folder / "image.onnx")
    two, three = ["a photo of a dog", "two"], ["a photo of two dogs on a wide beach", "three", "one of them"]
    _write(_Text(matcher), _captions(matcher, two), _captions(matcher, three), folder / "text.onnx")
    matcher.inputs.save(folder)


def _images(matcher: Matcher, rows: int, regions: int) -> dict[str, Tensor]:
    """Random images by the names of the graph's inputs."""
    image = matcher.inputs.image
    if image.kind == "pixels":
        return {"pixels": torch.randint(0, 256, (rows, 3, image.size, image.size), dtype=torch.uint8)}
    width = matcher.options["image"]["in_width"]
    return {"regions": torch.randn(rows, regions, width), "mask": torch.ones(rows, regions, dtype=torch.bool)}


def _captions(matcher: Matcher, texts: list[str]) -> dict[str, Tensor]:
    captions = matcher.inputs.captions(texts)
    return {"tokens": captions.tokens, "mask": captions.mask}


def _write(side: _Side, given: dict[str, Tensor], others: dict[str, Tensor], path: Path) -> None:
    """Recurrent layers pack their rows by length, which only the tracing exporter can write; attention only the other one traces freely."""
    free = {name: {0: "rows"} if name == "pixels" else {0: "rows", 1: "parts"} for name in given}
    side.eval()
    packs = any(isinstance(module, nn.RNNBase) for module in side.modules())
    settings: Any = {"dynamo": False, "dynamic_axes": free} if packs else {"dynamo": True, "dynamic_shapes": free, "external_data": False}
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(side, tuple(given.values()), str(path), input_names=list(given), output_names=["vector"], **settings)
        off = _off(path, side, others)
    if not off < TOLERANCE:
        raise ValueError(f"{path.name} would differ from the matcher by {off:.3g} where rows or lengths differ: a layer of it has no graph")


def _off(path: Path, side: _Side, given: dict[str, Tensor]) -> float:
    """The largest difference of a component of the vectors; infinite where the graph does not run."""
    from onnxruntime import InferenceSession, SessionOptions

    quiet = SessionOptions()
    quiet.log_severity_level = 4
    try:
        (found,) = InferenceSession(str(path), quiet).run(None, {name: tensor.numpy() for name, tensor in given.items()})
    except Exception:  # the runtime's own errors, which have no common class
        return float("inf")
    return float((torch.from_numpy(found) - side(*given.values())).abs().max())
