"""Packing inside the test process, without Ray between the shards."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from itm.config import Recipe, parse_recipe
from itm.data.formats import Json
from itm.data.manifest import QUARANTINE, Manifest
from pipelines import pack as packing


def recipe(root: Path | str, kind: str, options: Json, **data: Any) -> Recipe:
    section = {"source": {"kind": kind, "options": options}, "root": str(root), "shard_samples": 4, "max_reject_rate": 0.9, **data}
    return parse_recipe({"name": "t", "output": f"{root}-runs", "data": section, "model": {"kind": "dual"}})


def pack_here(choices: Recipe, monkeypatch: pytest.MonkeyPatch, **given: Any) -> dict[str, Manifest]:
    with monkeypatch.context() as patch:
        patch.setattr(
            packing,
            "_run_jobs",
            lambda recipe, jobs, title: {j.uri: packing.Receipt.model_validate_json(packing.pack_shard(j)) for j in jobs},
        )
        patch.setattr(packing, "_tracked", lambda *args: nullcontext(lambda manifest: None))
        return packing.pack(choices, **given)


def quarantine(folder: Path | str) -> list[Json]:
    uri = Path(folder) / QUARANTINE
    return [json.loads(line) for line in uri.read_text(encoding="utf-8").split("\n") if line] if uri.exists() else []
