"""A small Unicom of random weights, in a file as the released ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

PATCH, SIDE, WIDTH, HEADS, DEPTH, EMBEDDING = 8, 24, 128, 2, 2, 20
PATCHES = (SIDE // PATCH) ** 2


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """A small model under the keys of the released files, in float16 as they are."""
    made = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, PATCHES, WIDTH), "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH)}
    vectors = ["patch_embed.proj.bias", "norm.weight", "norm.bias"]
    for k in range(DEPTH):
        block = f"blocks.{k}"
        shapes |= {f"{block}.attn.qkv.weight": (3 * WIDTH, WIDTH), f"{block}.attn.proj.weight": (WIDTH, WIDTH)}
        shapes |= {f"{block}.mlp.fc1.weight": (4 * WIDTH, WIDTH), f"{block}.mlp.fc1.bias": (4 * WIDTH,)}
        shapes |= {f"{block}.mlp.fc2.weight": (WIDTH, 4 * WIDTH)}
        vectors += [
            f"{block}.{name}" for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.proj.bias", "mlp.fc2.bias")
        ]
    shapes |= {"feature.0.weight": (WIDTH, PATCHES * WIDTH), "feature.2.weight": (EMBEDDING, WIDTH)}
    for layer, width in ((1, WIDTH), (3, EMBEDDING)):
        shapes |= {f"feature.{layer}.{name}": (width,) for name in ("weight", "bias", "running_mean", "running_var")}
    shapes |= dict.fromkeys(vectors, (WIDTH,))
    state = {
        key: torch.randn(shape, generator=made) / shape[-1] ** 0.5 + key.endswith(("norm.weight", "1.weight"))
        for key, shape in shapes.items()
    }
    state |= {key: state[key].abs() + 0.5 for key in state if key.endswith("running_var")}
    return {key: value.half() for key, value in state.items()} | {f"feature.{k}.num_batches_tracked": torch.tensor(7) for k in (1, 3)}


def saved(path: Path, state: Any) -> str:
    torch.save(state, path)
    return str(path)
