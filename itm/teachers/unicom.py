"""Unicom, the image teacher of CUSA: its vision transformer, and its weight files as released. Equations: docs/methods/cusa.md#unicom."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from itm.data import files
from itm.data.pixels import decode
from itm.data.preprocess import as_images, fit
from itm.data.shards import Sample
from itm.importers.load import read_checkpoint
from itm.importers.state import bare_tensors, fill, state_of, tensor_of
from itm.matchers.encoders.towers import CLIP_PIXELS, Normalise
from itm.matchers.weights import tensors_sha256
from itm.teachers.identity import Modality, Teacher
from itm.teachers.image import image_bytes
from itm.types import Images

FAMILY = "Unicom"
HEAD_WIDTH = 64
"""Numbers a head in all four released models; the tensors do not tell it."""
RELEASED = {
    "f9d5696a9b58dbbbefee2d31615ca59084f2895a0fdd2ca4c235e0f9b2793f7a": "ViT-B-32",
    "c04f324f7c3b4435667236ec6c0eca1cd62f9d64fbfc2d06f8e8e60e6497edef": "ViT-B-16",
    "ff3ab62ff782876460099e6e0ee17b73a7c01109de2fffd595f16f4129404bbd": "ViT-L-14",
    "3916ab5aed3b522fc90345be8b4457fe5dad60801ad2af5a6871c0c096e8d7ea": "ViT-L-14-336px",
}
"""SHA-256 of the released files, which are FP16-<name>.pt -> the name of the model."""


class Attention(nn.Module):
    """Self-attention; q, k and v in one product without bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N,P,D) -> (N,P,D). Softmax and its two products are in float32 even under autocast, as released."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2).float() for part in self.qkv(tokens).chunk(3, dim=-1))
        with torch.autocast(tokens.device.type, enabled=False):
            read = F.scaled_dot_product_attention(q, k, v)
        return self.proj(read.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.relu6(self.fc1(tokens)))


class Block(nn.Module):
    """A transformer layer with its norms before attention and MLP."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), MLP(width, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Unicom(nn.Module):
    """Pixels (uint8) -> (N, P*D), all P patch tokens in raster order, or (N, E). Its parameters have their released names.

    trunk: the last LayerNorm's output, flattened; final: that through two linear layers, each with a BatchNorm.
    """

    def __init__(self, *, patch: int, patches: int, width: int, hidden: int, depth: int, heads: int, embedding: int) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.pos_embed = nn.Parameter(torch.zeros(1, patches, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(patches * width, width, bias=False),
            nn.BatchNorm1d(width, eps=2e-5),
            nn.Linear(width, embedding, bias=False),
            nn.BatchNorm1d(embedding, eps=2e-5),
        )
        self.normalise = Normalise(*CLIP_PIXELS)
        self.image_size = round(patches**0.5) * patch
        self.width, self.heads = {"trunk": patches * width, "final": embedding}, heads

    def forward(self, images: Images, tap: str, half: bool = False) -> Tensor:
        """half: attention and MLP under float16 autocast, as released for CUDA."""
        trunk = self.trunk(self.normalise(images), half)
        return self.feature(trunk) if tap == "final" else trunk

    def trunk(self, pixels: Tensor, half: bool = False) -> Tensor:
        """pixels: (N,3,S,S) float, normalised."""
        tokens = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.pos_embed
        with torch.autocast(pixels.device.type, torch.float16, enabled=half):
            for block in self.blocks:
                tokens = block(tokens)
        return self.norm(tokens.float()).flatten(1)


def load_unicom(state: Mapping[str, object], heads: int | None = None) -> Unicom:
    """The model of a flat state dict, float32, frozen, in evaluation mode. heads: where it has not 64 numbers a head.

    Raises ValueError naming missing or unexpected keys, shapes that do not fit, and heads that do not divide the width.
    """
    tensors = {key: value.float() if value.is_floating_point() else value for key, value in bare_tensors(state).items()}
    _, patches, width = _shape(tensors, "pos_embed", 3)
    if patches != round(patches**0.5) ** 2:
        raise ValueError(f"checkpoint does not fit {FAMILY}: pos_embed has {patches} positions, which are no square of patches")
    if heads is None and width % HEAD_WIDTH:
        raise ValueError(f"the tensors do not tell the number of heads at width {width}: give the teacher option heads=<number>")
    heads = heads or width // HEAD_WIDTH
    if width % heads:
        raise ValueError(f"heads={heads} do not divide the width {width}")
    model = Unicom(
        patch=_shape(tensors, "patch_embed.proj.weight", 4)[-1],
        patches=patches,
        width=width,
        hidden=_shape(tensors, "blocks.0.mlp.fc1.weight", 2)[0],
        depth=len({found[1] for key in tensors if (found := re.match(r"blocks\.(\d+)\.", key))}),
        heads=heads,
        embedding=_shape(tensors, "feature.2.weight", 2)[0],
    )
    fill(model, tensors)
    return model.eval().requires_grad_(False)


def _shape(tensors: Mapping[str, Tensor], key: str, axes: int) -> tuple[int, ...]:
    shape = tuple(tensor_of(tensors, key, FAMILY).shape)
    if len(shape) != axes:
        raise ValueError(f"checkpoint does not fit {FAMILY}: {key} is {shape}, expected {axes} axes")
    return shape


class UnicomTeacher(Teacher):
    """A weight file of Unicom (`FP16-ViT-B-32.pt`). tap: `trunk`, all patch tokens (37,632 wide for ViT-B/32), or `final` (512).

    Images: short side bicubic, centre crop. exif: they are turned as their EXIF orientation says, which the authors' code does not do.
    precision: fp32, or fp16, float16 autocast in attention and MLP as the authors' code has it on a GPU. heads: only of a model that was
    not released.
    """

    modality: Modality = "image"

    def __init__(
        self,
        path: str,
        tap: Literal["trunk", "final"] = "trunk",
        precision: Literal["fp32", "fp16"] = "fp32",
        exif: bool = True,
        heads: int | None = None,
    ) -> None:
        """Raises ValueError naming the file for one that is missing or is no Unicom, and for an unknown tap or precision."""
        if tap not in ("trunk", "final"):
            raise ValueError(f"tap {tap!r}; known: trunk, final")
        if precision not in ("fp32", "fp16"):
            raise ValueError(f"precision {precision!r} of teacher unicom; known: fp32, fp16")
        file = Path(files.absolute(path))
        try:
            content = read_checkpoint(file)
            if not isinstance(content, Mapping):
                raise ValueError(f"it holds a {type(content).__name__}, not the weights of {FAMILY}")
            model = load_unicom(state_of(content), heads)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"teacher unicom, path {path}: {error}") from None
        self.module, self.model, self.tap, self.half = model, model, tap, precision == "fp16"
        self.width = model.width[tap]
        self.prepare = partial(_pixels, size=model.image_size, exif=exif)
        with file.open("rb") as stream:
            released = RELEASED.get(hashlib.file_digest(stream, "sha256").hexdigest())
        self.identity = {
            "kind": "unicom",
            "model": released or file.name,
            "revision": "released" if released else None,
            "weights_sha256": tensors_sha256(model),
            "heads": model.heads,
            "layer": tap,
            "width": self.width,
            "dtype": precision,
            "preprocessing": {"version": 1, "size": model.image_size, "crop": "center", "exif": exif},
        }

    @torch.inference_mode()
    def embed(self, payloads: Sequence[bytes]) -> np.ndarray:
        """payloads: (S,S,3) uint8 bytes each -> (N, D) float32."""
        side = self.model.image_size
        pixels = np.stack([np.frombuffer(payload, np.uint8).reshape(side, side, 3) for payload in payloads])
        images = as_images({"pixels": pixels}, np.arange(len(payloads))).to(self.device)
        return self.model(images, self.tap, self.half).float().cpu().numpy()


def _pixels(sample: Sample, size: int, exif: bool) -> bytes:
    return fit(decode(image_bytes(sample), exif), size, "center").tobytes()
