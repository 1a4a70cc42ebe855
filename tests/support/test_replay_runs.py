"""A training of IAIS written here by hand (its AdamW, its losses, its pools), which the replay of whole trainings must accept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from itm.importers.uniter import load_uniter
from itm.losses.relation import relation_alignment_loss
from itm.matchers.joint.uniter import UNITER
from itm.types import Captions, Images
from tests.support.replay.run_iais import find

STEPS, MICRO, POOL, HARD, TOTAL = 2, 2, 5, 2, 10
SIZES: dict[str, Any] = {"hidden": 8, "layers": 2, "heads": 2, "positions": 12, "region_dim": 5, "intermediate": 12, "dropout": 0.0}
RATES = [1e-2, 7e-3]


def halves(generator: torch.Generator) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for half, texts, images in (("i_", POOL + 1, 1), ("t_", 1, POOL + 1)):
        lengths = torch.randint(4, 8, (STEPS, MICRO, texts), generator=generator)
        counts = torch.randint(3, 6, (STEPS, MICRO, images), generator=generator)
        tokens = torch.randint(4, 20, (STEPS, MICRO, texts, 7), generator=generator)
        tokens[..., 0] = 1
        tokens = tokens.scatter(3, lengths[..., None] - 1, 2) * (torch.arange(7) < lengths[..., None])
        real = (torch.arange(5) < counts[..., None])[..., None]
        found |= {f"{half}tokens": tokens, f"{half}lengths": lengths, f"{half}region_counts": counts}
        found[f"{half}regions"] = torch.randn(STEPS, MICRO, images, 5, 5, generator=generator) * real
        found[f"{half}boxes"] = torch.rand(STEPS, MICRO, images, 5, 7, generator=generator) * real
    return found


def half_loss(matcher: UNITER, given: dict[str, Tensor], half: str, at: tuple[int, int], tau: float) -> Tensor:
    """Mine the hardest of the pool, hinge on sigmoids over 8 (here MICRO) micro-steps, and the alignment of the positive in full."""
    tokens, regions, boxes = (given[f"{half}{name}"][at] for name in ("tokens", "regions", "boxes"))
    words = torch.arange(7) < given[f"{half}lengths"][at][:, None]
    real = torch.arange(5) < given[f"{half}region_counts"][at][:, None]

    def pairs(rows: Tensor, relations: Tensor | None) -> Any:
        chosen = [x[rows] if len(x) > 1 else x.expand(len(rows), *x.shape[1:]) for x in (tokens, words, regions, boxes, real)]
        images = Images(rows, regions=chosen[2].double(), boxes=chosen[3].double(), mask=chosen[4])
        return matcher.pairs(matcher.encode_images(images), matcher.encode_captions(Captions(chosen[0], chosen[1], rows)), relations)

    with torch.no_grad():
        hard = pairs(torch.arange(1, POOL + 1), None).scores.argsort(descending=True)[:HARD] + 1
    trained = pairs(torch.cat([torch.zeros(1, dtype=torch.int64), hard]), torch.tensor([0]))
    chances = trained.scores.sigmoid()
    r, anchor = trained.relations, "V" if half == "i_" else "L"
    aligned = relation_alignment_loss(r.blocks, r.word_mask, r.region_mask, anchor=anchor, kind="distributed", logits=r.logits)
    return (0.2 + chances[1:] - chances[0]).clamp(min=0).mean() / MICRO + tau * aligned


def by_hand(matcher: UNITER, given: dict[str, Tensor]) -> dict[str, np.ndarray]:
    arrays: dict[str, Any] = {f"init|{k}": v.float().numpy().copy() for k, v in matcher.state_dict().items()}
    weights = {n: p for n, p in matcher.named_parameters() if p.requires_grad}
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in weights.items()}
    arrays |= {"lr": np.array(RATES), "loss": [], "grad_norm": []}
    for step, rate in enumerate(RATES):
        tau = math.exp(5 * (step / TOTAL - 1))
        loss = sum(half_loss(matcher, given, half, (step, k), tau) for k in range(MICRO) for half in ("i_", "t_"))
        assert isinstance(loss, Tensor)
        grads = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True))
        norm = torch.stack([g.norm() for g in grads.values() if g is not None]).norm()
        arrays["loss"].append(float(loss.detach()))
        arrays["grad_norm"].append(float(norm))
        with torch.no_grad():
            for name, weight in weights.items():
                grad = grads[name]
                if grad is None:
                    continue
                grad = grad * min(1.0, 2.0 / (float(norm) + 1e-6))
                first, second = moments[name]
                first.copy_(0.9 * first + 0.1 * grad)
                second.copy_(0.98 * second + 0.02 * grad**2)
                correction = math.sqrt(1 - 0.98 ** (step + 1)) / (1 - 0.9 ** (step + 1))
                weight -= rate * correction * first / (second.sqrt() + 1e-6)
                if "bias" not in name and "LayerNorm.weight" not in name:
                    weight -= rate * 0.01 * weight
    arrays |= {f"after{STEPS}|{k}": v.detach().numpy().copy() for k, v in matcher.state_dict().items()}
    return arrays | {name: value.numpy() for name, value in given.items()}


def written(folder: Path, **changed: Any) -> Path:
    torch.manual_seed(0)
    fresh = UNITER(vocab_size=20, init_std=0.3, **SIZES)
    matcher = load_uniter(fresh.state_dict(), heads=2, dropout=0.0).double()
    given = halves(torch.Generator().manual_seed(1))
    options = {"IAIS": "distributed", "hard_neg_size": HARD, "margin": 0.2, "num_train_steps": TOTAL, "train_batch_size": MICRO}
    options |= {"num_attention_heads": 2, "betas": [0.9, 0.98], "weight_decay": 0.01, "grad_norm": 2.0, "eps": 1e-6}
    tolerance = {"loss": 1e-9, "grad_norm": 1e-9, f"after{STEPS}": 1e-9}
    about = {"kind": "run_iais", "options": options | changed, "steps": STEPS, "tolerance": tolerance}
    np.savez(folder / "arrays.npz", **by_hand(matcher, given))  # type: ignore[arg-type]
    (folder / "README.json").write_text(json.dumps(about))
    return folder


def worst(folder: Path) -> float:
    (case,) = find(folder)
    return max(check.differences()[0] for check in case.run())


def test_a_training_of_iais_by_hand_is_replayed_to_rounding(tmp_path: Path):
    assert worst(written(tmp_path)) < 1e-9


@pytest.mark.parametrize("changed", [{"eps": 1e-4}, {"weight_decay": 0.0}, {"IAIS": "singular"}, {"train_batch_size": 8}])
def test_the_replay_of_iais_sees_another_training(tmp_path: Path, changed: dict[str, Any]):
    assert worst(written(tmp_path, **changed)) > 1e-6
