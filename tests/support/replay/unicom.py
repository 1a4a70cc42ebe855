"""Golden cases of Unicom: both taps of its image encoder, on pixels that are normalised already."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from itm.teachers.unicom import load_unicom
from tests.support.replay import Case, Check


def find(root: Path) -> Iterator[Case]:
    for readme in sorted(root.rglob("README.json")):
        about = json.loads(readme.read_text())
        if isinstance(about, dict) and about.get("kind") == "unicom":
            yield from (Case(f"unicom/{Path(case['file']).stem}", partial(_run, readme.parent, case)) for case in about["cases"])


def _run(folder: Path, case: dict[str, Any]) -> Iterator[Check]:
    arrays = {name: torch.from_numpy(value) for name, value in np.load(folder / case["file"]).items()}
    state = {name.removeprefix("state|"): value for name, value in arrays.items() if name.startswith("state|")}
    model = load_unicom(state, heads=case["options"]["num_heads"])
    with torch.no_grad():
        trunk = model.trunk(arrays["pixels"].float())
        got = {"trunk": trunk, "final": model.feature(trunk)}
    for tap, tolerance in case["tolerance"].items():
        yield Check(tap, got[tap], arrays[tap], atol=tolerance, rtol=0)
    side, patch = case["options"]["input_size"], case["options"]["patch_size"]
    yield Check("image size", model.image_size, side // patch * patch)
