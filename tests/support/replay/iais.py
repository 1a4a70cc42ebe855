"""Replay of the UNITER + IAIS cases: steps, blocks, losses, gradients, scoring, schedules, databases.

Content: docs/methods/iais.md#how-it-is-checked.

A case is a folder with data.npz and a README.json whose `arrays` say what it holds; what is checked follows from the arrays present.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from itm.config import Train
from itm.data.sources.uniter_db import ImageDatabase, TextDatabase, region_count
from itm.evaluation.metrics import retrieval_metrics
from itm.importers.uniter import load_uniter
from itm.losses.relation import aligned_index, isda, relation_alignment_loss, relation_distances
from itm.matchers.joint.pairs import joint_sequence
from itm.matchers.joint.uniter import UNITER
from itm.methods.iais import IAIS, annealing
from itm.training.optim import learning_rate
from itm.types import Captions, Encoded, Images, Relations
from tests.support.iais_pools import hardest_of_pool, pool_step
from tests.support.replay import Case, Check

NAMES = ("L_singular", "V_singular", "L_distributed", "V_distributed")
BLOCKS = ("LL", "VV", "LV", "VL")
EXACT = partial(Check, atol=1e-9, rtol=1e-9)
TAU = partial(Check, atol=5e-8, rtol=2e-7)  # the official tau is float32
SINGLE = partial(Check, atol=1e-4, rtol=0.0)


def find(root: Path) -> Iterator[Case]:
    for readme in sorted(root.rglob("README.json")):
        data, about = readme.parent / "data.npz", json.loads(readme.read_text())
        arrays = about.get("arrays") if isinstance(about, dict) else None
        if not data.exists() or not isinstance(arrays, dict):
            continue
        for marker, run in _RUNS.items():
            if marker in arrays:
                yield Case(f"iais/{readme.parent.name}", partial(run, readme.parent, about))
                break


def _arrays(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "data.npz") as data:
        return dict(data)


def _matcher(folder: Path, about: dict[str, Any], dtype: torch.dtype) -> UNITER:
    with np.load(folder / "state_dict.npz") as file:
        state = {key: torch.from_numpy(value) for key, value in file.items()}
    matcher = load_uniter(state, heads=about["config"]["num_attention_heads"], dropout=0.0)
    return matcher.requires_grad_(True).to(dtype)


def _split(arrays: dict[str, np.ndarray], prefix: str = "") -> tuple[Images, Captions]:
    """Images and captions of a batch in the authors' layout; text or image side may have one row for many masks."""
    tokens, regions = torch.from_numpy(arrays[f"{prefix}input_ids"]), torch.from_numpy(arrays[f"{prefix}img_feat"])
    mask = torch.from_numpy(arrays[f"{prefix}attn_masks"]).bool()
    width = tokens.shape[1]
    boxes = torch.from_numpy(arrays[f"{prefix}img_pos_feat"])
    images = Images(torch.arange(len(regions)), regions=regions, boxes=boxes, mask=mask[: len(regions), width:])
    return images, Captions(tokens, mask[: len(tokens), :width], torch.arange(len(tokens)))


def _relations(arrays: dict[str, np.ndarray]) -> Relations:
    blocks = tuple(torch.from_numpy(arrays[f"attn_{name}"]).requires_grad_() for name in BLOCKS)
    masks = [torch.arange(blocks[i].shape[1]) < torch.from_numpy(arrays[name])[:, None] for i, name in ((0, "n_words"), (1, "n_regions"))]
    return Relations(blocks, *masks, logits=(blocks[0], blocks[1]))  # type: ignore[arg-type]


def _loss(relations: Relations, name: str) -> Tensor:
    anchor, kind = name.split("_")
    return relation_alignment_loss(relations.blocks, relations.word_mask, relations.region_mask, anchor=anchor, kind=kind)


def _blocks(folder: Path, about: dict[str, Any]) -> Iterator[Check]:
    arrays = _arrays(folder)
    yield from _block_checks(arrays)


def _block_checks(arrays: dict[str, np.ndarray]) -> Iterator[Check]:
    """Losses, per-pair values, gradients with respect to the maps, indices and ISDa from the recorded blocks alone."""
    for name in NAMES:
        relations = _relations(arrays)
        loss = _loss(relations, name)
        yield EXACT(f"loss_{name}", loss.detach(), arrays[f"loss_{name}"])
        anchor, kind = name.split("_")
        masks = relations.word_mask, relations.region_mask
        pairs = relation_distances(relations.blocks, *masks, anchor=anchor, kind=kind).detach()
        yield EXACT(f"pair_{name}", pairs, arrays[f"pair_{name}"])
        gradients = torch.autograd.grad(loss, relations.blocks, allow_unused=True)
        for block, tensor, gradient in zip(BLOCKS, relations.blocks, gradients, strict=True):
            if f"gmap_{name}__{block}" in arrays:
                got = torch.zeros_like(tensor) if gradient is None else gradient
                yield EXACT(f"gmap_{name}__{block}", got, arrays[f"gmap_{name}__{block}"])
        single = [b.detach().float() for b in relations.blocks]
        yield SINGLE(
            f"loss_{name} float32",
            relation_alignment_loss(tuple(single), *masks, anchor=anchor, kind=kind),  # type: ignore[arg-type]
            arrays[f"loss_{name}"],
        )
    if "idx_L" in arrays:
        for name, cross, own, other in (
            ("idx_L", 2, relations.word_mask, relations.region_mask),
            ("idx_V", 3, relations.region_mask, relations.word_mask),
        ):
            yield EXACT(name, aligned_index(relations.blocks[cross], other).masked_fill(~own, -1), arrays[name])
    if "entity_tok" in arrays:
        got = isda(relations.blocks[0], relations.blocks[1], *(torch.from_numpy(arrays[f"entity_{x}"]) for x in ("tok", "reg")))
        for name, value in (("sum", got.sum), ("mean", got.mean), ("A_L", got.words), ("A_V", got.regions)):
            yield EXACT(f"isda_{name}", value.detach(), arrays[f"isda_{name}"])


def _step(folder: Path, about: dict[str, Any]) -> Iterator[Check]:
    arrays = _arrays(folder)
    yield from _block_checks(arrays)
    yield from _forward(folder, about, arrays)
    yield from _gradients(folder, about, arrays)
    if "pool_input_ids" in arrays:
        yield from _mining(folder, about, arrays)


def _groups(arrays: dict[str, np.ndarray]) -> Tensor:
    rows, groups = len(arrays["input_ids"]), len(arrays["txt_attn_masks"])
    return torch.arange(0, rows, rows // groups)


def _encode(matcher: UNITER, images: Images, captions: Captions) -> tuple[Encoded, Encoded]:
    return matcher.encode_images(images), matcher.encode_captions(captions)


def _forward(folder: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> Iterator[Check]:
    for dtype, check, suffix in ((torch.float64, EXACT, ""), (torch.float32, SINGLE, " float32")):
        matcher = _matcher(folder, about, dtype)
        with torch.no_grad():
            images, captions = _encode(matcher, *_split(arrays))
            pairs = matcher.pairs(images, captions, _groups(arrays))
            hidden = matcher.uniter.encode(*joint_sequence(images, captions))
            short = matcher.pairs(images, captions).scores
        assert pairs.relations is not None
        real = torch.from_numpy(arrays["attn_masks"]).bool()
        valid = torch.cat([captions.mask, images.mask], 1)  # type: ignore[list-item]
        yield check(f"sequence_output{suffix}", hidden[valid], arrays["sequence_output"][real.numpy()])
        yield check(f"pooled{suffix}", matcher.uniter.pooler(hidden).detach(), arrays["pooled"])
        yield check(f"rank_scores{suffix}", pairs.scores[:, None], arrays["rank_scores"])
        compact = arrays.get("compact_rank_scores", arrays["rank_scores"])
        yield check(f"rank_scores compact{suffix}", short[:, None], compact)
        for name, block in zip(BLOCKS, pairs.relations.blocks, strict=True):
            want = arrays[f"attn_{name}"][:, : block.shape[1], : block.shape[2]]
            yield check(f"attn_{name}{suffix}", block, want)


def _terms(matcher: UNITER, arrays: dict[str, np.ndarray]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """rank, four alignments and their totals as one graph, and the two inputs as leaves."""
    images, captions = _split(arrays)
    leaves = {"img_feat": images.regions.double().requires_grad_(), "img_pos_feat": images.boxes.double().requires_grad_()}  # type: ignore[union-attr]
    images = Images(images.image_id, regions=leaves["img_feat"], boxes=leaves["img_pos_feat"], mask=images.mask)
    first = _groups(arrays)
    pairs = matcher.pairs(*_encode(matcher, images, captions), first)
    assert pairs.relations is not None
    probability = pairs.scores.view(len(first), -1).sigmoid()
    hinge = (0.2 + probability[:, 1:] - probability[:, :1]).clamp_min(0)
    terms = {"rank": hinge.mean(), **{name: _loss(pairs.relations, name) for name in NAMES}}
    if "tau" in arrays:
        terms |= {f"total_{name}": terms["rank"] / 8 + float(arrays["tau"]) * terms[name] for name in NAMES}
    return terms, leaves


def _gradients(folder: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> Iterator[Check]:
    matcher = _matcher(folder, about, torch.float64)
    terms, leaves = _terms(matcher, arrays)
    leaves |= {f"param:{name}": p for name, p in matcher.named_parameters()}
    yield EXACT("rank_loss_mean", terms["rank"].detach(), arrays["rank_loss_mean"])
    for name, term in terms.items():
        stored = f"loss_{name}" if name in NAMES else name
        if stored in arrays:
            yield EXACT(stored, term.detach(), arrays[stored])
        wanted = [key for key in arrays if key.startswith(f"gin_{name}__")]
        inputs = [leaves[key.split("__", 1)[1]] for key in wanted]
        gradients = torch.autograd.grad(term, inputs, retain_graph=True, allow_unused=True) if inputs else ()
        for key, leaf, gradient in zip(wanted, inputs, gradients, strict=True):
            yield EXACT(key, torch.zeros_like(leaf) if gradient is None else gradient, arrays[key])


def _mining(folder: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> Iterator[Check]:
    """The half step of the method from the pool, against the authors' training forward."""
    matcher = _matcher(folder, about, torch.float64)
    images, captions = _split(arrays, "pool_")
    keep = about["config"]["hard_size"]
    with torch.no_grad():
        scores = matcher.score(*_encode(matcher, images, captions)).reshape(-1, 1)
    yield EXACT("pool_scores", scores, arrays["pool_scores"])
    rows = hardest_of_pool(matcher, images, captions, keep)
    yield EXACT("hard_indices", rows[1:].sort().values, np.sort(arrays["hard_indices"]))
    anchor, side = ("L", "text") if len(captions) == 1 else ("V", "image")
    for kind in ("singular", "distributed"):
        method = IAIS(
            matcher, alignment=kind, weight=1.0, schedule="constant", ranking={"hard_negatives": keep, "margin": about["config"]["margin"]}
        )
        terms = pool_step(method.train(), images, captions)
        yield EXACT(f"step_rank_loss {kind}", terms[f"rank_{side}"].detach(), arrays["step_rank_loss"].mean())
        yield EXACT(f"step_{anchor}_{kind}", terms[f"iais_{side}"].detach(), arrays[f"step_{anchor}_{kind}"])


def _scoring(folder: Path, about: dict[str, Any]) -> Iterator[Check]:
    arrays, config = _arrays(folder), about["config"]
    counts = [region_count(row, config["conf_th"], config["min_bb"], config["max_bb"]) for row in arrays["conf"]]
    yield EXACT("num_regions", counts, arrays["num_regions"])
    boxes = arrays["norm_bb"].astype(np.float32)
    boxes = np.concatenate([boxes, boxes[..., 4:5] * boxes[..., 5:6]], -1)
    mask = np.arange(boxes.shape[1]) < arrays["num_regions"][:, None]
    features = torch.from_numpy(arrays["features"].astype(np.float32))
    images = Images(torch.arange(len(mask)), regions=features, boxes=torch.from_numpy(boxes), mask=torch.from_numpy(mask))
    tokens, lengths = arrays["text_tokens"], arrays["text_len"]
    padded = np.zeros((len(tokens), tokens.shape[1] + 2), np.int64)
    padded[:, 1:-1], padded[:, 0] = tokens, config["CLS"]
    padded[np.arange(len(tokens)), lengths + 1] = config["SEP"]
    word_mask = torch.from_numpy(np.arange(padded.shape[1]) < lengths[:, None] + 2)
    captions = Captions(torch.from_numpy(padded), word_mask, torch.from_numpy(arrays["txt2img"]))
    for dtype, check in ((torch.float64, EXACT), (torch.float32, partial(Check, atol=2e-4, rtol=0.0))):
        matcher = _matcher(folder, about, dtype)
        matcher.score_tokens = 100
        with torch.no_grad():
            scores = matcher.score(*_encode(matcher, images, captions))
        yield check(f"score_matrix {dtype}", scores[arrays["image_order"]].T, arrays["score_matrix"])
    yield from _recalls("", scores, arrays, captions.image_id)
    if "big_score_matrix" in arrays:
        yield from _recalls("big_", torch.from_numpy(arrays["big_score_matrix"]).T, arrays, torch.from_numpy(arrays["big_txt2img"]))


def _recalls(prefix: str, scores: Tensor, arrays: dict[str, np.ndarray], image_of: Tensor) -> Iterator[Check]:
    found = retrieval_metrics(scores, (torch.arange(len(scores)), image_of))
    printed = retrieval_metrics(scores, (torch.arange(len(scores)), image_of), tie="official_iais")
    images = [found[f"i2t_r{k}"] / 100 for k in (1, 5, 10)]
    for name, texts in (
        ("correct", [found[f"t2i_r{k}"] / 100 for k in (1, 5, 10)]),
        ("official", [printed[f"t2i_r{k}"] / 100 for k in (1, 5, 10)]),
    ):
        means = [float(np.mean(images)), float(np.mean(texts))]
        yield EXACT(
            f"{prefix}metrics_{name}", [*images, means[0], *texts, means[1], float(np.mean(means))], arrays[f"{prefix}metrics_{name}"]
        )


def _schedules(folder: Path, about: dict[str, Any]) -> Iterator[Check]:
    arrays, config = _arrays(folder), about["config"]
    steps, total = arrays["step"].tolist(), config["num_train_steps"]
    for name in ("linear", "exp", "log"):
        yield TAU(f"tsa_{name}_schedule", [annealing(name, t, total) for t in steps], arrays[f"tsa_{name}_schedule"])
    train = Train(schedule="linear", lr=config["learning_rate"], warmup_steps=config["warmup_steps"])
    rates = [learning_rate(train, t - 1, total, total) for t in steps]
    yield Check("lr", rates, arrays["lr"], atol=1e-18, rtol=1e-12)


def _databases(folder: Path, about: dict[str, Any]) -> Iterator[Check]:
    arrays = _arrays(folder)
    images = ImageDatabase(next(p.parent for p in sorted(folder.glob("img/*/data.mdb"))))
    texts = TextDatabase(folder / "txt")
    for row, name in enumerate(about["image_names"]):
        regions, boxes = images.tensors(name)
        count = int(arrays["num_regions"][row])
        yield EXACT(f"{name} features", regions, arrays["img_feat"][row, :count])
        yield EXACT(f"{name} boxes", boxes, arrays["img_pos_feat"][row, :count])
    yield EXACT("text_len", [texts.lengths[key] for key in about["text_ids"]], arrays["text_len"])
    yield EXACT("txt2img", [about["image_names"].index(texts.image_of[key]) for key in about["text_ids"]], arrays["txt2img"])
    for row, key in enumerate(about["text_ids"]):
        ids = texts.input_ids(key)
        yield EXACT(f"input_ids {key}", ids, arrays["input_ids"][row, : len(ids)])
    for file in sorted(folder.glob("npz/imgs/*.npz")):
        with np.load(file) as raw:
            c = about["config"]
            count = region_count(raw["conf"], c["conf_th"], c["min_bb"], c["max_bb"])
        yield EXACT(f"{file.name} region count", count, arrays["num_regions"][about["image_names"].index(file.name)])


_RUNS = {
    "tsa_exp_schedule": _schedules,
    "score_matrix": _scoring,
    "sequence_output": _step,
    "text_len": _databases,
    "pair_L_singular": _blocks,
}
