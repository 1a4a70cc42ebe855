"""Short trainings of the authors' own programs, step by step: batches, losses, gradient norms, weights, scores, recalls.

A case is a folder with README.json (`kind`: run_sgraf, run_scan, run_cusa, run_iais, run_naaf_walk) and arrays.npz; its README names the
tolerance of every array. Everything is computed in float64, by the methods, optimisers and rates that a recipe would choose.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from itm.config import Train
from itm.evaluation.metrics import retrieval_metrics
from itm.importers.clip import _renamed, load_clip
from itm.importers.scan import load_scan, own_name
from itm.matchers.late.base import gram, raw_scores
from itm.matchers.late.naaf import NaafState, naaf_walk
from itm.matchers.late.uarda_attention import Attention
from itm.methods.cusa import CUSA
from itm.methods.matching import Matching
from itm.training.optim import build_optimizer, learning_rate, set_rate
from itm.types import Batch, Captions, Images, Method, SoftLabels
from tests.support.replay import Case, Check
from tests.support.replay.cusa import default_dtype, method_options
from tests.support.replay.uarda import _naaf_column

Arrays = dict[str, np.ndarray]
Losses = Callable[[int], dict[str, Tensor]]


def find(root: Path) -> Iterator[Case]:
    for readme in sorted(root.rglob("README.json")):
        about = json.loads(readme.read_text())
        run = RUNS.get(about.get("kind")) if isinstance(about, dict) else None
        if run is not None and (readme.parent / "arrays.npz").exists():
            yield Case(f"runs/{readme.parent.name}", partial(_in_double, run, readme.parent, about))


def _in_double(run: Callable[..., Iterator[Check]], folder: Path, about: dict[str, Any]) -> Iterator[Check]:
    arrays = dict(np.load(folder / "arrays.npz"))
    with default_dtype(torch.float64):
        yield from run(arrays, about)


def double(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array, np.float64))


def no_dropout(matcher: nn.Module) -> None:
    for module in matcher.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def check(about: dict[str, Any], name: str, got: Any, want: Any, tolerance: str = "") -> Check:
    value = got.detach().numpy() if isinstance(got, Tensor) else np.asarray(got)
    return Check(name, value, want, atol=about.get("tolerance", {}).get(tolerance or name, 1e-9), rtol=0.0)


def captions_of(arrays: Arrays, prefix: str, at: int | None = None) -> Captions:
    """Captions of step `at`, or of an evaluation (None), cut to the longest. Row k belongs to the image in row k, unless it says."""
    tokens, lengths = (torch.from_numpy(arrays[prefix + name]) for name in ("tokens", "lengths"))
    tokens, lengths = (tokens, lengths) if at is None else (tokens[at], lengths[at])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    owner = arrays[f"{prefix}caption_image"] if at is None else arrays[f"{prefix}image_id"][at]
    return Captions(tokens[:, : mask.shape[1]], mask, torch.from_numpy(owner))


class GivenPixels(nn.Module):
    """A case gives the numbers that the program's model was given, which it made of the pixels in float32."""

    def forward(self, images: Images) -> Tensor:
        assert images.pixels is not None
        return images.pixels


class Trainer:
    """A method, its optimiser and the rate of each step; `step` compares what a step gives, `after` the weights that it leaves."""

    def __init__(self, about: dict[str, Any], arrays: Arrays, method: Method, train: Train) -> None:
        self.about, self.arrays, self.method, self.train = about, arrays, method, train
        self.optimizer = build_optimizer(method, train)
        self.rates: list[float] = []

    def step(self, number: int, losses: dict[str, Tensor]) -> dict[str, float]:
        """Backward, clip, update; returns the losses and the gradient norm before clipping."""
        total = torch.stack(list(losses.values())).sum()
        self.rates.append(learning_rate(self.train, number, self.about["steps_per_epoch"], self.about["steps"]))
        set_rate(self.optimizer, float(self.arrays["lr"][number]))
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        most = self.train.clip_norm or float("inf")
        norm = float(nn.utils.clip_grad_norm_(self.method.parameters(), most))
        self.optimizer.step()
        return {name: float(value.detach()) for name, value in losses.items()} | {"loss": float(total.detach()), "grad_norm": norm}

    def run(self, losses: Losses, state: Callable[[], Arrays], names: dict[str, str]) -> Iterator[Check]:
        """All steps; names: array of the case -> name of what `step` returns."""
        saved = {int(k.split("|")[0].removeprefix("after").split("_")[0]) for k in self.arrays if k.startswith("after")}
        seen: list[dict[str, float]] = []
        for number in range(self.about["steps"]):
            seen.append(self.step(number, losses(number)))
            if number + 1 in saved:
                yield from self.after(number + 1, state())
        yield check(self.about, "lr", self.rates, self.arrays["lr"])
        for name, ours in names.items():
            yield check(self.about, name, [row[ours] for row in seen], self.arrays[name])

    def after(self, number: int, state: Arrays) -> Iterator[Check]:
        """Every tensor that the case kept, in full or as sum, norm and first eight values."""
        for name, want in self.arrays.items():
            kind, _, key = name.partition("|")
            if kind == f"after{number}":
                yield check(self.about, name, state[key], want, kind)
            elif kind == f"after{number}_sum_norm_first8":
                flat = state[key].reshape(-1)
                yield check(self.about, name, [flat.sum(), np.linalg.norm(flat), *flat[:8]], want, kind)


def recalls(scores: Tensor, caption_image: np.ndarray) -> dict[str, list[float]]:
    """R@1, R@5, R@10, median and mean rank of both directions."""
    found = retrieval_metrics(scores, (torch.arange(len(scores)), torch.from_numpy(caption_image)))
    return {way: [found[f"{way}_{name}"] for name in ("r1", "r5", "r10", "medr", "meanr")] for way in ("i2t", "t2i")}


def sgraf(arrays: Arrays, about: dict[str, Any]) -> Iterator[Check]:
    """SCAN, SGR or SAF under the triplet loss of all or of the hardest negatives, as each step of the case says."""
    parts: list[dict[str, Tensor]] = [{}, {}, {}]
    for name, value in arrays.items():
        if name.startswith("init|"):
            _, part, key = name.split("|")
            parts[int(part)][key] = torch.from_numpy(value)
    options = about["options"]
    matcher: Any = load_scan({"model": [part for part in parts if part], "opt": options}).double()
    no_dropout(matcher)
    by_mode = {hard: Matching(matcher, loss="triplet", margin=options["margin"], official=True, hardest=hard) for hard in (True, False)}
    names = {own_name(i, key): f"{i}|{key}" for i, part in enumerate(parts) for key in part}
    scores: list[Tensor] = []
    matcher.training_terms = lambda found, *_, **__: scores.append(found) or {}  # a method calls it with the scores of each step

    def losses(number: int) -> dict[str, Tensor]:
        regions = double(arrays["batch_regions"][number])
        captions = captions_of(arrays, "batch_", number)
        method = by_mode[bool(arrays["hardest"][number])].train()
        return method(Batch(Images(captions.image_id, regions=regions), captions), step=number)

    train = _adam(about, options)
    trainer = Trainer(about, arrays, by_mode[True], train)
    state = lambda: {names[k]: v.detach().numpy().copy() for k, v in matcher.state_dict().items() if k in names}
    yield from trainer.run(losses, state, {"loss": "loss", "grad_norm": "grad_norm"})
    yield check(about, "batch_scores", torch.stack(scores), arrays["batch_scores"])
    matcher.eval()
    captions = captions_of(arrays, "eval_")
    with torch.no_grad():
        images = Images(torch.arange(len(arrays["eval_regions"])), regions=double(arrays["eval_regions"]))
        got = matcher.score(matcher.encode_images(images), matcher.encode_captions(captions))
    yield check(about, "eval_scores", got, arrays["eval_scores"])
    for way, values in recalls(got, arrays["eval_caption_image"]).items():
        yield Check(f"eval_{way}", np.array(values), arrays[f"eval_{way}"], atol=about["tolerance"][f"eval_{way}"] + 1e-9, rtol=0.0)


def _adam(about: dict[str, Any], options: dict[str, Any]) -> Train:
    more = {"schedule": "step", "step_epochs": options["lr_update"], "clip_norm": options["grad_clip"] or None}
    return _train(about, optimizer="adam", lr=options["learning_rate"], **more)


def _train(about: dict[str, Any], **more: Any) -> Train:
    """With the moments and the decay of the recorded optimiser."""
    given = about["optimizer"]
    return Train(betas=tuple(given["betas"]), eps=given["eps"], weight_decay=given["weight_decay"], **more)


def cusa(arrays: Arrays, about: dict[str, Any]) -> Iterator[Check]:
    """CUSA on CLIP with the authors' decay of temperatures (train.decayed=cusa)."""
    init = {name.partition("|")[2]: torch.from_numpy(value) for name, value in arrays.items() if name.startswith("init|")}
    matcher: Any = load_clip({k: v for k, v in init.items() if k not in about["temperatures"]}).double()
    matcher.normalise = GivenPixels()
    method = CUSA(matcher, **method_options(about["loss_config"]))
    temperatures = _temperatures(method)
    with torch.no_grad():
        for name in about["temperatures"]:
            temperatures[name].copy_(init[name])
    given, plan = about["optimizer"], about["schedule"]
    more = {"decayed": "cusa", "schedule": "cosine_epoch", "min_lr": plan["min_lr"], "clip_norm": given["clip"]}
    train = _train(about, optimizer="adamw", lr=given["lr"], **more)
    used: list[list[float]] = []
    left: list[list[float]] = []
    trainer = Trainer(about, arrays, method, train)

    def losses(number: int) -> dict[str, Tensor]:
        if number:
            left.append([float(temperatures[n].detach()) for n in about["temperatures"]])
        captions = captions_of(arrays, "batch_", number)
        teacher = SoftLabels(*(double(arrays[f"teacher_{side}"][number]) for side in ("image", "text")))
        batch = Batch(Images(captions.image_id, pixels=double(arrays["batch_input"][number])), captions, teacher)
        found = method.train()(batch, step=number)
        used.append([float(temperatures[n].detach()) for n in about["temperatures"]])
        return found

    def state() -> Arrays:
        ours = matcher.state_dict()
        own = {key: _their_tensor(key, value, ours) for key, value in init.items() if key not in temperatures}
        return own | {name: value.detach().numpy().copy() for name, value in temperatures.items()}

    terms = {name: name for name in ("loss", "grad_norm", "itc", "csa", "usa") if name in arrays}
    yield from trainer.run(losses, state, terms)
    left.append([float(temperatures[n].detach()) for n in about["temperatures"]])
    yield check(about, "temperatures", used, arrays["temperatures"])
    yield check(about, "temperatures_after", left, arrays["temperatures_after"])
    matcher.eval()
    captions = captions_of(arrays, "eval_")
    with torch.no_grad():
        images = Images(torch.arange(len(arrays["eval_input"])), pixels=double(arrays["eval_input"]))
        got = matcher.score(matcher.encode_images(images), matcher.encode_captions(captions))
    yield check(about, "eval_scores", got, arrays["eval_scores"])
    found = recalls(got, arrays["eval_caption_image"])
    theirs = {"txt": found["i2t"], "img": found["t2i"]}
    for side, values in theirs.items():
        for k, value in zip((1, 5, 10), values[:3], strict=True):
            yield Check(f"{side}_r{k}", round(value, 2), about["eval_metrics"][f"{side}_r{k}"], atol=1e-9, rtol=0.0)


def _temperatures(method: CUSA) -> dict[str, nn.Parameter]:
    """The authors' name of each temperature -> ours."""
    found: dict[str, nn.Parameter] = {"tau": method.get_submodule("itc").tau} if "itc" in method.terms else {}  # type: ignore[dict-item]
    for name, pair in method.temperatures.items():
        term, _, role = name.partition("_")
        label = f"{ {'csa': 'cross', 'usa': 'uni'}[term] }_{'the_softlabel_' if role == 'teacher' else ''}tau"
        for key, value in pair.values.items():  # type: ignore[union-attr,operator]
            found[label if key == "shared" else f"{label}_{key}"] = value
    return found


def _their_tensor(key: str, like: Tensor, ours: dict[str, Tensor]) -> np.ndarray:
    """The tensor that the importer takes apart, put together again."""
    key = key.removeprefix("clip_model.")
    pieces = [ours[name] for name in _renamed(key, like)]
    whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return (whole.T if key in ("visual.proj", "text_projection") else whole).detach().numpy().copy()


def walk(arrays: Arrays, about: dict[str, Any]) -> Iterator[Check]:
    """NAAF's thresholds over many batches, given the choices among tied rows that its unstable sort made."""
    options = about["options"]
    state = NaafState(options["thres_start"], options["thres_safe_start"])
    attention = Attention("softmax", options["lambda_softmax"])
    tolerance = {name: min(1e-12, given) for name, given in about["tolerance"].items() if name != "scores"}
    found: dict[str, list[Any]] = {name: [] for name in (*tolerance, "scores")}
    for step in range(len(arrays["scores"])):
        images, captions = double(arrays["images"][step]), double(arrays["captions"][step])
        mask = torch.arange(captions.shape[1]) < torch.from_numpy(arrays["lengths"][step])[:, None]
        raw, grams, columns = raw_scores(captions, images), gram(images), []

        def score(caption: int, t: float, step: int = step, given: Any = (raw, grams, mask), columns: Any = columns) -> Tensor:
            columns.append(_naaf_column(given[0], given[1], given[2], caption, t, attention))
            return torch.from_numpy(arrays["scores"][step][:, caption])

        def choose(caption: int, scores: Tensor, step: int = step) -> tuple[int, int]:
            return int(arrays["top"][step, caption]), int(arrays["bottom"][step, caption])

        recorded = {"choose": choose} if "top" in arrays else {}
        found["used"].append(naaf_walk(raw.amax(-1), mask, score, state, options["alpha"], **recorded))
        found["scores"].append(torch.stack(columns, 1).numpy())
        found["thres"].append(state.t)
        found["thres_safe"].append(state.t_safe)
        for name, value in zip(("mean_pos", "stnd_pos", "mean_neg", "stnd_neg"), state.statistics, strict=True):
            found[name].append(value)
    for name, values in found.items():
        yield Check(name, np.array(values), arrays[name], atol=tolerance.get(name, about["tolerance"]["scores"]), rtol=0.0)


RUNS: dict[str | None, Callable[..., Iterator[Check]]] = {
    "run_sgraf": sgraf,
    "run_scan": sgraf,
    "run_cusa": cusa,
    "run_naaf_walk": walk,
}
