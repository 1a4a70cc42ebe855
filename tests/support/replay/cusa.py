"""Replay of the CUSA golden cases: losses and their gradients, caption clean-up and CLIP token ids, image preparation, learning rates.

A folder is recognised by its files: a README.json whose `cases` hold a `loss_config`, captions.json, clip_preprocess.npz, lr_schedule.json.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from itm.config import Train
from itm.data.preprocess import ImageInput, Inputs
from itm.data.text import HFTokenizer, clean_caption
from itm.losses.contrastive import contrastive_rows
from itm.losses.soft_label import cosine_matrix, soft_label_loss
from itm.matchers.dual import Heads, cosines
from itm.matchers.encoders.towers import CLIP_PIXELS, Normalise
from itm.methods.cusa import CUSA
from itm.training.optim import learning_rate
from itm.types import Batch, Captions, Encoded, Images, Matcher, SoftLabels
from tests.support.ranks import joined, spawn_ranks
from tests.support.replay import Case, Check

TERMS = {"itc": "contrastive", "csa": "cross_modal", "usa": "uni_modal"}
SIDES = ("image", "text")


def find(root: Path) -> Iterator[Case]:
    for readme in sorted(root.rglob("README.json")):
        folder = readme.parent
        about = json.loads(readme.read_text())
        cases = about.get("cases") if isinstance(about, dict) else None
        cases = cases if isinstance(cases, dict) else {}
        for name, case in cases.items():
            if "loss_config" in case or "loss_config_note" in case:
                yield Case(f"cusa/loss/{name}", partial(_loss, folder / f"{name}.npz", case, cases))
        if (folder / "captions.json").exists():
            yield Case("cusa/text", partial(_text, folder / "captions.json"))
        if (folder / "clip_preprocess.npz").exists():
            yield Case("cusa/preprocess", partial(_preprocess, folder / "clip_preprocess.npz"))
        if (folder / "lr_schedule.json").exists():
            yield Case("cusa/schedule", partial(_schedule, folder / "lr_schedule.json"))


class Given(Matcher):
    """A matcher whose encoders return the features of a golden case, so that gradients arrive at those features."""

    def __init__(self, arrays: dict[str, np.ndarray], dtype: torch.dtype) -> None:
        super().__init__()
        self.features = nn.ParameterDict(
            {
                k[3:]: nn.Parameter(torch.tensor(v, dtype=dtype))
                for k, v in arrays.items()
                if k.startswith(("in_cross", "in_uni", "in_clip"))
            }
        )
        self.heads = nn.ModuleDict()
        weights = {k[6:]: torch.tensor(v, dtype=dtype) for k, v in arrays.items() if k.startswith("param_")}
        if weights:
            for side in SIDES:
                present = {head: f"{head}_{side}_projection_bias" in weights for head in ("cross", "uni")}
                heads = Heads(arrays[f"in_clip_{side}"].shape[1], **present)
                heads.load_state_dict({key: weights[name] for key, name in head_names(side).items() if name in weights})
                self.heads[side] = heads
        self.uni_width = 1

    def _encode(self, side: str) -> Encoded:
        if self.heads:
            return self.heads[side](self.features[f"clip_{side}"])
        cross, uni = self.features[f"cross_{side}"], self.features[f"uni_{side}"]
        return Encoded(vector=nn.functional.normalize(cross), uni=nn.functional.normalize(uni))

    def encode_images(self, images: Images) -> Encoded:
        return self._encode("image")

    def encode_captions(self, captions: Captions) -> Encoded:
        return self._encode("text")

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        return cosines(images, captions)


def head_names(side: str) -> dict[str, str]:
    """Our key -> the authors' name of each head weight of one modality."""
    return {
        f"{head}.{ours}.{leaf}": f"{theirs}{head}_{side}_projection_{leaf}"
        for head in ("cross", "uni")
        for ours, theirs in (("norm", "ln_"), ("linear", ""))
        for leaf in ("weight", "bias")
    }


def method_options(config: dict[str, Any]) -> dict[str, Any]:
    """The authors' loss_config as options of `CUSA`."""
    itc, csa, usa = config["contrastive"], config["cross_softlabel"], config["uni_softlabel"]
    options: dict[str, Any] = {"itc": False, "csa": False, "usa": False}
    if itc["is_on"]:
        options["itc"] = {
            "weight": itc["rate"],
            "tau": itc["tau"],
            "tau_range": (itc["tau_min"], itc["tau_max"]),
            "learn_tau": not itc["is_block_tau"],
            "reduction": itc["contrastive_loss_mode"],
        }
    for name, given in (("csa", csa), ("usa", usa)):
        if given["is_on"]:
            options[name] = {
                "weight": given["rate"],
                "loss": given["use_loss"],
                "reduction": given["contrastive_loss_mode"],
                "student": _temperature(given, ""),
                "teacher": _temperature(given, "softlabel_"),
            }
    if csa["is_on"]:
        options["csa"]["mode"] = csa["cross_softlabel_mode"]
    if usa["is_on"]:
        options["usa"] |= {"student": "csa"} if usa["use_cross_softlabel_same_tau"] else {}
        options["usa"] |= {"teacher": "csa"} if usa["use_cross_softlabel_same_softlabel_tau"] else {}
    return options


def _temperature(given: dict[str, Any], role: str) -> dict[str, Any]:
    prefix = f"the_{role}" if role else ""
    values = {side: given[f"{prefix}{side}_tau"] for side in SIDES}
    ranges = {f"{side}_range": (given[f"{prefix}{side}_tau_min"], given[f"{prefix}{side}_tau_max"]) for side in SIDES}
    return {**values, **ranges, "shared": given[f"use_same_{role}tau"], "learn": not given[f"is_block_{role}tau"]}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Temperatures made inside are exact decimals of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run_method(
    arrays: dict[str, np.ndarray], config: dict[str, Any], dtype: torch.dtype, gather: Any = False
) -> tuple[CUSA, Given, dict[str, Tensor]]:
    """The method built, run and differentiated on a case. All-zero teacher vectors, which we refuse, go past the check."""
    with default_dtype(dtype):
        matcher = Given(arrays, dtype)
        method = CUSA(matcher, gather=gather, **method_options(config))
        rows = len(next(iter(matcher.features.values())))
        ids = torch.as_tensor(arrays["in_idx"]) if "in_idx" in arrays else torch.arange(rows)
        blank = torch.zeros(rows, 1, dtype=torch.int64)
        teacher = SoftLabels(*(torch.tensor(arrays[f"in_teacher_{side}"], dtype=dtype) for side in SIDES))
        batch = Batch(Images(ids), Captions(blank, blank.bool(), ids), teacher)
        usable = all(np.abs(arrays[f"in_teacher_{side}"]).sum(-1).all() for side in SIDES)
        with nullcontext() if usable else patch("itm.methods.cusa.check_teacher", _any_vectors):
            losses = method(batch)
        torch.stack(list(losses.values())).sum().backward()
    return method, matcher, losses


def _any_vectors(vectors: Tensor, rows: int, side: str, known: Tensor | None = None) -> Tensor:
    return vectors.reshape(rows, -1)


def _loss(path: Path, case: dict[str, Any], cases: dict[str, Any]) -> Iterator[Check]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    config = case.get("loss_config") or next(c["loss_config"] for c in cases.values() if "loss_config" in c)
    for prefix, dtype in (("f32", torch.float32), ("f64", torch.float64)):
        # the authors' 1/k targets are float32 whatever the dtype: exact ones differ where images repeat
        exact = dtype == torch.float64
        tolerance = {"atol": 1e-9 if exact else 1e-8, "rtol": 1e-5 if not exact else 1e-6 if case.get("idx") == "dup" else 0.0}
        if case.get("world_size", 1) > 1:
            for rank, got in enumerate(run_ranks(arrays, config, dtype, case["world_size"])):
                yield from _compare(got, arrays, f"rank{rank}_{prefix}_", tolerance)
        else:
            yield from _compare(measure(*run_method(arrays, config, dtype), arrays), arrays, f"{prefix}_", tolerance)


def _compare(got: dict[str, Any], arrays: dict[str, np.ndarray], prefix: str, tolerance: dict[str, float]) -> Iterator[Check]:
    """Every stored result must have a counterpart; a missing one is a failed check."""
    for name, want in arrays.items():
        if name.startswith(prefix):
            yield Check(name, got.get(name.removeprefix(prefix), np.empty(0)), want, **tolerance)


def measure(method: CUSA, matcher: Given, losses: dict[str, Tensor], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Everything a case stores, under the names it uses."""
    zero = torch.zeros(())
    got: dict[str, Any] = {f"loss_{theirs}": losses.get(ours, zero) for ours, theirs in TERMS.items()}
    got["loss_total"] = torch.stack(list(losses.values())).sum()
    for name, value in matcher.features.items():
        got[f"grad_{name}"] = torch.zeros_like(value) if value.grad is None else value.grad
    for side, heads in matcher.heads.items():
        weights = dict(heads.named_parameters())
        got |= {f"grad_param_{theirs}": weights[ours].grad for ours, theirs in head_names(side).items() if ours in weights}
    if "itc" in method.terms:
        got |= {"used_tau": method.itc.tau, "grad_tau": method.itc.tau.grad}
    for name, pair in method.temperatures.items():
        term, _, role = name.partition("_")
        label = f"{ {'csa': 'cross', 'usa': 'uni'}[term] }_{'the_softlabel_' if role == 'teacher' else ''}tau"
        for key, value in pair.values.items():  # type: ignore[union-attr,operator]
            suffix = "" if key == "shared" else f"_{key}"
            got |= {f"used_{label}{suffix}": value, f"grad_{label}{suffix}": value.grad}
    got |= _intermediate(method, matcher, arrays)
    return {name: value.detach().numpy() if isinstance(value, Tensor) else value for name, value in got.items()}


@torch.no_grad()
def _intermediate(method: CUSA, matcher: Given, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    images, captions = matcher._encode("image"), matcher._encode("text")
    dtype = images.vector.dtype if images.vector is not None else torch.float32
    scores = cosines(images, captions)
    given = {side: torch.tensor(arrays[f"in_teacher_{side}"], dtype=dtype) for side in SIDES}
    teacher = {side: cosine_matrix(_any_vectors(vectors, len(images), side)) for side, vectors in given.items()}
    got = {f"teacher_sim_{side}": value for side, value in teacher.items()} | {"logits_image_text": scores}
    if images.uni is not None and captions.uni is not None:
        got |= {"logits_image_image": images.uni @ images.uni.T, "logits_text_text": captions.uni @ captions.uni.T}
    if "itc" in method.terms:
        ids = torch.as_tensor(arrays.get("in_idx", np.arange(len(images))))
        positives = (ids[:, None] == ids).to(dtype)
        for name, rows in (("i2t", scores), ("t2i", scores.T)):
            got[f"term_itc_{name}"] = contrastive_rows(rows, method.itc.tau, positives, method.itc.options.reduction)
    pairs = {
        "csa": (("i2t", scores), ("t2i", scores.T)),
        "usa": (("i2i", got.get("logits_image_image")), ("t2t", got.get("logits_text_text"))),
    }
    for term, options in (("csa", method.csa), ("usa", method.usa)):
        if options is None:
            continue
        taus = zip(pairs[term], teacher.values(), method.temperature(f"{term}_student"), method.temperature(f"{term}_teacher"), strict=True)
        for (name, rows), target, tau, teacher_tau in taus:
            assert rows is not None
            got[f"term_{term}_{name}"] = soft_label_loss(rows, target, tau, teacher_tau, loss=options.loss, reduction=options.reduction)
    return got


def run_ranks(arrays: dict[str, np.ndarray], config: dict[str, Any], dtype: torch.dtype, world: int) -> list[dict[str, Any]]:
    """The results of each of `world` processes that gather, in rank order."""
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    spawn_ranks(_rank_main, world, world, arrays, config, dtype, queue)
    return [got for _, got in sorted((queue.get() for _ in range(world)), key=lambda pair: pair[0])]


def _rank_main(
    rank: int, port: int, world: int, arrays: dict[str, np.ndarray], config: dict[str, Any], dtype: torch.dtype, queue: Any
) -> None:
    with joined(rank, port, world):
        own = {name: np.split(value, world)[rank] if name.startswith("in_") else value for name, value in arrays.items()}
        method, matcher, losses = run_method(own, config, dtype, gather="official")
        queue.put((rank, measure(method, matcher, losses, own)))


def _text(path: Path) -> Iterator[Check]:
    stored = json.loads(path.read_text())
    for i, case in enumerate(stored["cases"]):
        yield Check(f"clean {i}", clean_caption(case["raw"], case["max_words"]), case["out"])
    for i, case in enumerate(stored["empty"]):
        yield Check(f"empty {i}", _raises(case["raw"]), case["error"])
    merges = clip_merges()
    if merges is None:
        print(
            f"SKIPPED cusa/text: {len(stored['clip_token_ids'])} CLIP token lists; install openai-clip==1.0.1 or set CLIP_MERGES",
            file=sys.stderr,
        )
        return
    tokenizer = HFTokenizer(merges, max_length=77, clean=False)
    for i, case in enumerate(stored["clip_token_ids"]):
        tokens, mask = tokenizer([case["text"]])
        yield Check(f"token ids {i}", tokens[mask].numpy(), np.array(case["ids"]), atol=0, rtol=0)


def _raises(raw: str) -> str:
    try:
        return clean_caption(raw)
    except ValueError:
        return "ValueError"


def clip_merges() -> Path | None:
    """CLIP's merges file: from $CLIP_MERGES or from an installed `clip` or `open_clip` package (not imported)."""
    if "CLIP_MERGES" in os.environ:
        return Path(os.environ["CLIP_MERGES"])
    for package in ("clip", "open_clip"):
        spec = find_spec(package)
        for place in (spec and spec.submodule_search_locations) or []:
            if (found := Path(place) / "bpe_simple_vocab_16e6.txt.gz").exists():
                return found
    return None


def _preprocess(path: Path) -> Iterator[Check]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    normalise = Normalise(*CLIP_PIXELS)
    for name in arrays:
        stem, _, what = name.rpartition("_image")
        if what or not stem:
            continue
        data = io.BytesIO()
        Image.fromarray(arrays[name]).save(data, "PNG")
        for size in sorted(int(key.split("_")[-2]) for key in arrays if key.startswith(stem) and key.endswith("_grid")):
            pixels = normalise(Inputs(ImageInput(size=size, crop="center"), None).images([data.getvalue()]))[0]
            step = size // 14
            yield Check(f"{stem}_{size}_grid", pixels[:, ::step, ::step].numpy(), arrays[f"{stem}_{size}_grid"])
            moments = torch.stack([pixels.mean(), pixels.std(unbiased=False)])
            yield Check(f"{stem}_{size}_mean_std", moments.numpy(), arrays[f"{stem}_{size}_mean_std"], atol=1e-4)
            yield Check(f"{stem}_{size}_channel_mean", pixels.mean((1, 2)).numpy(), arrays[f"{stem}_{size}_channel_mean"])


def _schedule(path: Path) -> Iterator[Check]:
    train = Train(lr=1e-5, min_lr=1e-6, schedule="cosine_epoch")
    for epochs, rates in json.loads(path.read_text()).items():
        got = [learning_rate(train, epoch * 7 + 3, 7, 7 * int(epochs)) for epoch in range(int(epochs))]
        yield Check(f"{epochs} epochs", np.array(got), np.array(rates), atol=0, rtol=1e-9)
