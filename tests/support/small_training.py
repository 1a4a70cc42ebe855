"""A training of ten steps inside the test process, its last weights, and how to interrupt it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from itm.config import Recipe, parse_recipe
from itm.data.sidecar import Header, sidecar_uri, teacher_id, write_sidecar, write_store
from itm.training.step import Step
from tests.support.noise_split import every_sample, small_split, world


def recipe(root: Path, method: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **given: Any) -> Recipe:
    options = {"image": {"kind": "conv", "image_size": 16, "hidden": 16}, "text": {"kind": "pooled_gru", "word_dim": 8, "hidden": 8}}
    choices = {
        "name": given.pop("name", "run"),
        "output": f"{root}/runs",
        "data": {"root": f"{root}/shards", "image_size": 16, "shuffle_window": 2, **(data or {})},
        "text": {"max_length": 10},
        "teachers": given.pop("teachers", {}),
        "model": {"kind": "dual", "options": {**options, "width": 8}},
        "method": method or {"kind": "matching"},
        "train": {"batch_size": 6, "steps": 10, "workers": 0, "validate_every": 5, "checkpoint_every": 2, "log_every": 1, **given},
    }
    return parse_recipe(choices)


def splits(root: Path, **given: Any) -> None:
    small_split(root / "shards", "train", **given)
    small_split(root / "shards", "val", shards=1)


def final(root: Path, name: str = "run", step: int = 10) -> dict[str, torch.Tensor]:
    return load_file(root / "runs" / name / "checkpoints" / f"{step:09d}.model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def die_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of a training ends as if it was interrupted when it is about to take `step`."""
    whole = Step.__call__

    def dying(self: Step, batches: Any, number: int) -> Any:
        if number == step:
            raise KeyboardInterrupt
        return whole(self, batches, number)

    monkeypatch.setattr(Step, "__call__", dying)


def teach_noise(root: Path, **given: bool) -> dict[str, Any]:
    """Stores of random vectors for the shards of `splits`; returns the recipe's choice of teachers."""
    pairs = world(root / "same", **given)  # the same shards once more, to list their rows
    stores = f"{root}/shards/train/teachers"
    for modality in ("image", "text"):
        identity = {"kind": "noise", "of": modality}
        headers = {}
        for info, samples in zip(pairs.fetch.manifest.shards, every_sample(pairs), strict=True):
            rows = [(s.key, c.id) for s in samples for c in s.captions] if modality == "text" else [(s.key, "") for s in samples]
            uri = sidecar_uri(f"{stores}/{teacher_id(identity)}", info.name)
            header = Header(identity, modality, "fp32", info.name, info.sha256)
            captions = [c for _, c in rows] if modality == "text" else None
            headers[info.name] = write_sidecar(uri, header, [k for k, _ in rows], torch.randn(len(rows), 4).numpy(), captions)
        write_store(stores, {"modality": modality, "kind": "noise", "options": {}, "dtype": "fp32"}, headers, identity)
    return {"dtype": "fp32", "image": {"kind": "noise"}, "text": {"kind": "noise"}}
