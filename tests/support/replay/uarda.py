"""UARDA's threshold solver against brute force, and its shared parts against NAAF's code: attention, scores, thresholds, gradients.

Cases are the files threshold.npz, naaf_score.npz and naaf_train.npz. NAAF's own branches (relevance score, negative effect), which UARDA
does not have, are put together here from our attention so that the oracle's whole score and gradient can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from itm.losses.triplet import triplet_loss
from itm.matchers.late.base import gram, raw_scores
from itm.matchers.late.naaf import NaafState, naaf_threshold, naaf_walk
from itm.matchers.late.scan import normalise_raw
from itm.matchers.late.uarda import relevance_threshold
from itm.matchers.late.uarda_attention import Attention
from itm.matchers.late.uarda_threshold import local_minimum, misclassification_cost
from tests.support.replay import Case, Check

PARAMETERS = ("mu_pos", "sigma_pos", "mu_neg", "sigma_neg", "alpha")


def find(root: Path) -> Iterator[Case]:
    for name, run in (("threshold", solver), ("naaf_score", score), ("naaf_train", train)):
        for path in sorted(root.rglob(f"{name}.npz")):
            yield Case(f"uarda/{path.parent.name}/{name}", lambda run=run, path=path: run(_load(path)))


def _load(path: Path) -> dict[str, Any]:
    return {k: v if v.dtype.kind == "U" else torch.from_numpy(np.asarray(v)) for k, v in np.load(path).items()}


def solver(z: dict[str, Any]) -> Iterator[Check]:
    given = [z[name].clone().requires_grad_() for name in PARAMETERS]
    t = relevance_threshold(*given)
    t.sum().backward()
    with torch.no_grad():
        unique = z["unique"]
        yield Check("t_opt", t[unique], z["t_opt"][unique], atol=1e-9, rtol=0)
        for name, at in (("cost_opt", t), ("cost_at_0", torch.zeros_like(t)), ("cost_at_1", torch.ones_like(t))):
            cost, want = misclassification_cost(at, *given), z[name]
            small = want < 1e-6
            yield Check(f"{name} small", cost[small], want[small], atol=1e-12, rtol=0)
            yield Check(f"{name} relative", cost[~small] / want[~small], torch.ones_like(want[~small]), atol=1e-9, rtol=0)
        root = local_minimum(*given)
        for k in range(len(root)):
            yield Check(f"root {k}", root[k], z["root_unclamped"][k], atol=1e-9, rtol=1e-9)
        for column, x in enumerate(given):
            assert x.grad is not None
            known = ~z["dt_dparam"][:, column].isnan()
            want = z["dt_dparam"][known, column]
            yield Check(f"dt/d{PARAMETERS[column]}", x.grad[known] / want, torch.ones_like(want), atol=1e-6, rtol=0)
        raw = [naaf_threshold(*(float(x[k]) for x in given)) for k in range(len(t))]
        for k, (value, _) in enumerate(raw):
            yield Check(f"naaf formula {k}", value, z["naaf_formula_raw"][k], atol=1e-9, rtol=1e-9)


def _mask(z: dict[str, Any]) -> Tensor:
    return torch.arange(z["captions"].shape[1])[None] < z["lengths"][:, None]


def score(z: dict[str, Any]) -> Iterator[Check]:
    images, captions, mask, t = z["images"], z["captions"], _mask(z), float(z["thres"])
    full, attention = torch.ones(images.shape[:2], dtype=torch.bool), Attention("softmax", float(z["lambda_softmax"]))
    raw = raw_scores(captions, images)
    yield Check("attn", raw, z["attn"], atol=1e-12)
    directions = (
        ("", "uarda_t2i", raw, gram(images), full, mask),
        ("_i2t", "uarda_i2t", raw.permute(1, 0, 3, 2), gram(captions), mask, full),
    )
    for suffix, total, scores, grams, context_mask, query_mask in directions:
        e = attention.unnormalised(scores, context_mask, t)
        weights = e / e.sum(-1, keepdim=True).clamp(min=1e-30)
        relevance = attention.relevance(scores, grams, context_mask, t)
        mean = (relevance * query_mask).sum(-1) / query_mask.sum(-1)
        flip = bool(suffix)
        yield Check(f"attn_pos{suffix}", weights.transpose(0, 1) if flip else weights, z[f"attn_pos{suffix}"], atol=2e-8, rtol=0)
        yield Check(f"s_f{suffix}", relevance.transpose(0, 1) if flip else relevance, z[f"s_f{suffix}"], atol=1e-9, rtol=0)
        yield Check(total, mean.T if flip else mean, z[total], atol=1e-9, rtol=0)
    naaf = torch.stack([_naaf_column(raw, gram(images), mask, j, t, attention) for j in range(len(captions))], 1)
    yield Check("naaf_train_scores", naaf, z["naaf_train_scores"], atol=1e-9, rtol=0)


def _naaf_column(raw: Tensor, grams: Tensor, mask: Tensor, caption: int, t: float, attention: Attention) -> Tensor:
    """(I,) NAAF training scores of one caption: mean over words of feature cosine + relevance score + negative effect."""
    own = raw[:, caption, mask[caption]].unsqueeze(1)
    full = torch.ones(raw.shape[0], raw.shape[3], dtype=torch.bool)
    feature = attention.relevance(own, grams, full, t)
    words = torch.ones(1, own.shape[2], dtype=torch.bool)
    weights = (attention.lambda_softmax * normalise_raw(own, "clipped_l2norm", words)).softmax(-1)
    negative = (own.amax(-1) - t).clamp(max=0)
    return (feature + (weights * own).sum(-1) + negative).mean(-1)[:, 0]


def train(z: dict[str, Any]) -> Iterator[Check]:
    images, captions, mask = z["images"].clone().requires_grad_(), z["captions"].clone().requires_grad_(), _mask(z)
    raw, attention, columns = raw_scores(captions, images), Attention("softmax", float(z["lambda_softmax"])), []

    def score_column(caption: int, t: float) -> Tensor:
        columns.append(_naaf_column(raw, gram(images), mask, caption, t, attention))
        return columns[-1].detach()

    state = NaafState(float(z["thres_in"]), float(z["thres_safe_in"]))
    used = naaf_walk(raw.detach().amax(-1), mask, score_column, state, float(z["alpha"]))
    scores = torch.stack(columns, 1)
    loss = triplet_loss(scores, margin=float(z["margin"]), hardest=True, official=True)
    loss.backward()
    assert images.grad is not None and captions.grad is not None
    got = {"scores": scores.detach(), "loss": loss.detach(), "grad_images": images.grad, "grad_captions": captions.grad}
    got |= {"thres_used": torch.tensor(used, dtype=torch.float64), "thres_out": state.t, "thres_safe_out": state.t_safe}
    got |= dict(zip(("mean_pos", "stnd_pos", "mean_neg", "stnd_neg"), state.statistics, strict=True))
    for name, value in got.items():
        yield Check(name, value, z[name], atol=1e-9, rtol=0)
