"""Trainings of IAIS' own program: each step takes an image-anchored and a text-anchored half, mined from a pool, micro-step by micro-step.

A case is a folder with README.json of kind run_iais and arrays.npz. `i_` arrays hold the image-anchored halves (one image, a pool of
captions, the positive first), `t_` arrays the text-anchored ones; the step comes first, then, where steps accumulate, the micro-step.
Arrays and options are called as in the README (tokens, lengths, regions, boxes, region_counts) or as in the program (input_ids, ...).
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
from itm.evaluation.metrics import retrieval_metrics
from itm.importers.uniter import load_uniter
from itm.methods.iais import IAIS
from itm.types import Captions, Images
from tests.support.iais_pools import pool_step
from tests.support.replay import Case, Check
from tests.support.replay.cusa import default_dtype
from tests.support.replay.runs import Arrays, Trainer, check, double

TOKENS, REGIONS, BOXES = ("tokens", "input_ids"), ("regions", "img_feat", "features"), ("boxes", "img_pos_feat")
LENGTHS = ("lengths", "txt_lens", "text_lengths", "text_len", "token_lengths", "n_tokens")
COUNTS = ("region_counts", "num_bbs", "num_regions", "region_lengths", "regions_lengths", "n_regions", "counts")
OPTIONS: dict[str, tuple[tuple[str, ...], Any]] = {
    "heads": (("num_attention_heads", "heads"), None),
    "alignment": (("alignment", "IAIS", "iais", "iais_type", "kind"), "singular"),
    "hard": (("hard_neg_size", "hard_negatives", "hard_size", "hard"), None),
    "margin": (("margin",), 0.2),
    "total": (("num_train_steps", "total_steps", "T"), None),
    "schedule": (("tsa_schedule", "iais_schedule", "anneal", "annealing"), "exp"),
    "accumulate": (("train_batch_size", "accumulate", "gradient_accumulation_steps"), None),
    "clip": (("grad_norm", "clip", "clip_norm"), None),
    "eps": (("eps",), 1e-6),
    "betas": (("betas",), (0.9, 0.98)),
    "weight_decay": (("weight_decay",), 0.01),
}


def find(root: Path) -> Iterator[Case]:
    for readme in sorted(root.rglob("README.json")):
        about = json.loads(readme.read_text())
        if isinstance(about, dict) and about.get("kind") == "run_iais" and (readme.parent / "arrays.npz").exists():
            yield Case(f"runs/{readme.parent.name}", partial(run, readme.parent, about))


def options_of(about: dict[str, Any]) -> dict[str, Any]:
    """Each choice under whichever of its names some section of the README gives it."""
    sections = [about, *(about[name] for name in ("options", "config", "model", "optimizer", "schedule", "iais") if name in about)]
    held = {key: value for section in sections if isinstance(section, dict) for key, value in section.items()}
    return {name: next((held[key] for key in keys if key in held), usual) for name, (keys, usual) in OPTIONS.items()}


def run(folder: Path, about: dict[str, Any]) -> Iterator[Check]:
    arrays = dict(np.load(folder / "arrays.npz"))
    with default_dtype(torch.float64):
        yield from _run(arrays, about, options_of(about))


def _run(arrays: Arrays, about: dict[str, Any], given: dict[str, Any]) -> Iterator[Check]:
    state = {name.partition("|")[2]: torch.from_numpy(value) for name, value in arrays.items() if name.startswith("init|")}
    heads = {} if given["heads"] is None else {"heads": given["heads"]}
    matcher = load_uniter(state, dropout=0.0, **heads).double()
    for name, weight in matcher.named_parameters():
        weight.requires_grad_(name in state and "mask_embedding" not in name and not name.startswith("itm_output"))
    first = find_array(arrays, "i_", TOKENS)
    micro = first.shape[1] if first.ndim == 4 else 1
    share = given["accumulate"] or micro
    steps = about.get("steps", len(first))
    # weight = share: the ranking terms are divided by the micro-steps, the alignment is not (docs/methods/iais.md#schedule)
    method = IAIS(
        matcher,
        alignment=given["alignment"],
        weight=float(share),
        schedule=given["schedule"],
        steps=given["total"] or steps,
        ranking={"margin": given["margin"], "hard_negatives": given["hard"] or 31},
    )
    train = Train(
        optimizer="adamw_uniter",
        decayed="uniter",
        lr=float(arrays["lr"].max()),
        betas=tuple(given["betas"]),
        eps=given["eps"],
        weight_decay=given["weight_decay"],
        clip_norm=given["clip"],
    )
    trainer = Trainer({"steps_per_epoch": 1, **about, "steps": steps}, arrays, method, train)

    def losses(number: int) -> dict[str, Tensor]:
        method.train()
        terms: dict[str, Tensor] = {}
        for at in [(number, k) for k in range(micro)] if first.ndim == 4 else [(number,)]:
            for half in ("i_", "t_"):
                images, captions = pairs_of(arrays, half, at)
                for name, value in pool_step(method, images, captions, number).items():
                    terms[name] = terms.get(name, torch.zeros(())) + value / share
        return terms

    told = {name: name for name in ("loss", "grad_norm") if name in arrays}
    for found in trainer.run(losses, partial(_state, matcher, _aliased(arrays)), told):
        if found.name != "lr":  # the rates are the case's own
            yield found
    if "eval_scores" in arrays:
        yield from _evaluation(arrays, about, matcher.eval())


def _aliased(arrays: Arrays) -> bool:
    """Whether the program's ranking head was a view of row 1 of its matching head, which then moves with it (on a CPU it is)."""
    ends = [v for k, v in arrays.items() if k.startswith("after") and k.endswith("|itm_output.weight") and v.ndim == 2]
    return bool(ends) and not np.allclose(ends[-1][1], arrays["init|itm_output.weight"][1], atol=1e-12, rtol=0)


def _state(matcher: Any, aliased: bool) -> Arrays:
    held = {name: value.detach().numpy().copy() for name, value in matcher.state_dict().items()}
    if aliased:
        for part in ("weight", "bias"):
            held[f"itm_output.{part}"][1:2] = held[f"rank_output.{part}"]
    return held


def _evaluation(arrays: Arrays, about: dict[str, Any], matcher: Any) -> Iterator[Check]:
    images, captions = pairs_of(arrays, "eval_", ())
    with torch.no_grad():
        scores = matcher.score(matcher.encode_images(images), matcher.encode_captions(captions))
    yield check(about, "eval_scores", scores.T, arrays["eval_scores"])
    owner = next((arrays[name] for name in ("eval_caption_image", "eval_txt2img") if name in arrays), None)
    if owner is not None and "eval_i2t" in arrays:
        found = retrieval_metrics(scores, (torch.arange(len(scores)), torch.from_numpy(owner)))
        for way in ("i2t", "t2i"):
            got = [found[f"{way}_r{k}"] for k in (1, 5, 10)]
            yield Check(f"eval_{way}", got, arrays[f"eval_{way}"][:3], atol=about["tolerance"].get(f"eval_{way}", 0.0) + 1e-9, rtol=0.0)


def find_array(arrays: Arrays, prefix: str, names: tuple[str, ...]) -> np.ndarray:
    """Raises ValueError naming what the case holds under the prefix."""
    for name in names:
        if prefix + name in arrays:
            return arrays[prefix + name]
    raise ValueError(f"no {prefix}{' or '.join(names)} in this case; it has {', '.join(sorted(k for k in arrays if k.startswith(prefix)))}")


def pairs_of(arrays: Arrays, prefix: str, at: tuple[int, ...]) -> tuple[Images, Captions]:
    """Images and captions of a half of a (micro-)step: real tokens and regions by their counts, by joint masks, or by what is not 0."""
    tokens = torch.from_numpy(find_array(arrays, prefix, TOKENS)[at])
    regions, boxes = (double(find_array(arrays, prefix, names)[at]) for names in (REGIONS, BOXES))
    tokens = tokens if tokens.dim() == 2 else tokens[None]
    regions, boxes = (x if x.dim() == 3 else x[None] for x in (regions, boxes))
    if f"{prefix}attn_masks" in arrays:
        joint = torch.from_numpy(arrays[f"{prefix}attn_masks"][at]).bool()
        words, real = joint[: len(tokens), : tokens.shape[1]], joint[: len(regions), tokens.shape[1] :]
    else:
        words = _mask(arrays, prefix, LENGTHS, at, tokens.shape[1], tokens != 0)
        real = _mask(arrays, prefix, COUNTS, at, regions.shape[1], regions.abs().sum(-1) != 0)
    images = Images(torch.arange(len(regions)), regions=regions, boxes=boxes, mask=real)
    return images, Captions(tokens, words, torch.arange(len(tokens)))


def _mask(arrays: Arrays, prefix: str, names: tuple[str, ...], at: tuple[int, ...], width: int, usual: Tensor) -> Tensor:
    held = next((arrays[prefix + name] for name in names if prefix + name in arrays), None)
    return usual if held is None else torch.arange(width) < torch.from_numpy(np.atleast_1d(held[at]))[:, None]
