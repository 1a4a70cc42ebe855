"""SCAN, SGR and SAF against the authors' classes: embeddings, scores, losses, gradients, trajectories, running statistics, every mode.

A case is a folder with README.json whose `kind` is sgraf or scan. float32: 5e-6 forward; float64: 1e-9.
Why so tight: docs/methods/sgraf.md#how-it-is-checked.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from itm.importers.load import load_official
from itm.importers.scan import own_name
from itm.losses.triplet import triplet_loss
from itm.types import Captions, Encoded, Images
from tests.support.replay import Case, Check

KINDS = ("sgraf", "scan")
DEFAULTS = {"margin": 0.2, "grad_clip": 2.0, "learning_rate": 2e-4}


def find(root: Path) -> Iterator[Case]:
    for readme in sorted(root.rglob("README.json")):
        about = json.loads(readme.read_text())
        if isinstance(about, dict) and about.get("kind") in KINDS and (readme.parent / "arrays.npz").exists():
            yield Case(f"sgraf/{readme.parent.name}", lambda folder=readme.parent, about=about: run(folder, about))


def run(folder: Path, about: dict[str, Any]) -> Iterator[Check]:
    arrays = dict(np.load(folder / "arrays.npz"))
    matcher: Any = load_official(folder / "model_best.pth.tar")
    config = {**DEFAULTS, **about.get("config", {})}
    for module in matcher.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for suffix, dtype, tolerance in (("", torch.float32, 5e-6), ("_f64", torch.float64, 1e-9)):
        yield from _forward(copy.deepcopy(matcher).to(dtype), arrays, config["margin"], (suffix, tolerance))
        for mode in ("max", "sum"):
            if f"traj_{mode}_losses{suffix}" in arrays:
                yield from _trajectory(copy.deepcopy(matcher).to(dtype), arrays, config, (mode, suffix))
    for mode in about.get("modes", []):
        yield from _grid(matcher, arrays, mode, config["margin"])


def _inputs(arrays: dict[str, np.ndarray], prefix: str = "") -> tuple[Images, Captions]:
    images, tokens, lengths = (torch.from_numpy(arrays[prefix + name]) for name in ("images", "captions", "lengths"))
    mask = torch.arange(tokens.shape[1])[None] < lengths[:, None]
    return Images(torch.arange(len(images)), regions=images), Captions(tokens, mask, torch.arange(len(tokens)))


def _scores(matcher: Any, inputs: tuple[Images, Captions]) -> Tensor:
    return matcher.score(matcher.encode_images(inputs[0]), matcher.encode_captions(inputs[1]))


def _forward(matcher: Any, arrays: dict[str, np.ndarray], margin: float, kind: tuple[str, float]) -> Iterator[Check]:
    suffix, tolerance = kind
    inputs = _inputs(arrays)
    with torch.no_grad():
        images, captions = matcher.encode_images(inputs[0]), matcher.encode_captions(inputs[1])
        got: dict[str, Any] = {"img_emb": images.parts, "cap_emb": captions.parts, "sims": matcher.score(images, captions)}
        if "train_images" in arrays:
            scores = got["train_batch_eval_sims"] = _scores(matcher, _inputs(arrays, "train_"))
            got["loss_eval_max"] = triplet_loss(scores, margin=margin, hardest=True, official=True)
            got["loss_eval_sum"] = triplet_loss(scores, margin=margin, hardest=False, official=True)
    for name, value in got.items():
        if name + suffix in arrays:
            yield Check(name + suffix, value.numpy(), arrays[name + suffix], atol=tolerance, rtol=tolerance)


def _trajectory(matcher: Any, arrays: dict[str, np.ndarray], config: dict[str, Any], kind: tuple[str, str]) -> Iterator[Check]:
    """Training steps on one batch: fresh Adam, clipping, batch statistics. float32: see the README's float32_note."""
    mode, suffix = kind
    exact = bool(suffix)
    inputs, prefix = _inputs(arrays, "train_"), f"traj_{mode}_"
    matcher.train()
    optimiser = torch.optim.Adam(matcher.parameters(), lr=config["learning_rate"])
    losses, norms, sims = [], [], []
    for step in range(len(arrays[f"{prefix}losses{suffix}"])):
        scores = _scores(matcher, inputs)
        loss = triplet_loss(scores, margin=config["margin"], hardest=mode == "max", official=True)
        optimiser.zero_grad()
        loss.backward()
        if exact and step == 0:
            yield from _gradients(matcher, arrays, mode)
        norms.append(float(torch.nn.utils.clip_grad_norm_(matcher.parameters(), config["grad_clip"])))
        optimiser.step()
        losses.append(loss.item())
        sims.append(scores.detach().numpy())
    tolerance = 1e-9 if exact else 2e-4
    got: dict[str, Any] = {"losses": losses, "gradnorms": norms, "sims": np.stack(sims)}
    if exact:
        matcher.eval()
        with torch.no_grad():
            got["eval_sims"] = _scores(matcher, _inputs(arrays)).numpy()
    for name, value in got.items():
        yield Check(prefix + name + suffix, np.asarray(value), arrays[prefix + name + suffix], atol=tolerance, rtol=tolerance)
    if exact:
        yield from _after(matcher, arrays, mode)


def _gradients(matcher: nn.Module, arrays: dict[str, np.ndarray], mode: str) -> Iterator[Check]:
    own = dict(matcher.named_parameters())
    for name in arrays:
        if name.startswith(f"grad1_{mode}|"):
            key = name.split("|")[1]
            found = next(own[n] for n in (own_name(0, key), own_name(1, key), own_name(2, key)) if n in own)
            assert found.grad is not None
            yield Check(name, found.grad.numpy().copy(), arrays[name], atol=1e-9, rtol=1e-9)


def _after(matcher: nn.Module, arrays: dict[str, np.ndarray], mode: str) -> Iterator[Check]:
    state = matcher.state_dict()
    for name in arrays:
        if name.startswith(f"after_{mode}|"):
            _, part, key = name.split("|")
            yield Check(name, state[own_name(int(part), key)].numpy(), arrays[name], atol=1e-9, rtol=1e-9)


def _grid(matcher: Any, arrays: dict[str, np.ndarray], mode: dict[str, Any], margin: float) -> Iterator[Check]:
    """Every direction, aggregation and raw norm on one set of embeddings."""
    key = mode["key"]
    matcher.cross_attn, matcher.agg_func, matcher.raw_feature_norm = key.split("|")
    matcher.lambda_softmax, matcher.lambda_lse = mode["lambda_softmax"], mode["lambda_lse"]
    lengths = torch.from_numpy(arrays["lengths"])
    image_parts, word_parts = torch.from_numpy(arrays["img_emb"]), torch.from_numpy(arrays["cap_emb"])
    mask = torch.arange(word_parts.shape[1])[None] < lengths[:, None]
    full = torch.ones(image_parts.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        for name, dtype, tolerance in (("sims", torch.float32, 1e-5), ("sims_f64", torch.float64, 1e-9)):
            scores = matcher.score(Encoded(parts=image_parts.to(dtype), mask=full), Encoded(parts=word_parts.to(dtype), mask=mask))
            yield Check(f"{name}|{key}", scores.numpy(), arrays[f"{name}|{key}"], atol=tolerance, rtol=tolerance)
    square = scores[:, : len(scores)] if scores.shape[0] <= scores.shape[1] else scores[: scores.shape[1]]
    for hardest, name in ((True, "loss_max"), (False, "loss_sum")):
        loss = triplet_loss(square, margin=margin, hardest=hardest, official=True)
        yield Check(f"{name}|{key}", loss.numpy(), arrays[f"{name}|{key}"], atol=1e-9, rtol=1e-9)
