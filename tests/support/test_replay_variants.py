"""Golden folders that the stored ones do not cover, written here by a plain reference: one caption at a time, batch norm as modules.

The reference follows the SCAN and SGRAF specs and shares nothing with the sources; the replay of `make golden` must accept its numbers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.support.replay import cusa
from tests.support.replay.sgraf import find

BASE: dict[str, Any] = {"img_dim": 9, "word_dim": 6, "embed_size": 8, "sim_dim": 5, "num_layers": 1, "bi_gru": True, "vocab_size": 20}
BASE |= {"no_imgnorm": False, "no_txtnorm": False, "margin": 0.2, "grad_clip": 2.0, "learning_rate": 2e-4, "regions": 6, "zip": True}
SCAN: dict[str, Any] = {"cross_attn": "t2i", "raw_feature_norm": "clipped_l2norm", "agg_func": "LogSumExp", "precomp_enc_type": "basic"}
SCAN |= {"lambda_lse": 6.0, "lambda_softmax": 9.0}
CASES: dict[str, dict[str, Any]] = {
    "sgr_step2_uni": {"module_name": "SGR", "sgr_step": 2, "bi_gru": False},
    "sgr_b1": {"module_name": "SGR", "sgr_step": 4, "images": 1, "captions": [5], "batch": 2},
    "sgr_no_norms": {"module_name": "SGR", "sgr_step": 1, "no_imgnorm": True, "no_txtnorm": True, "margin": 0.3, "grad_clip": 0.5},
    "saf_2layer": {"module_name": "SAF", "num_layers": 2, "zip": False},
    "saf_r36": {"module_name": "SAF", "regions": 36},
    "scan_t2i_sum_l2": SCAN | {"agg_func": "Sum", "raw_feature_norm": "l2norm"},
    "scan_t2i_max": SCAN | {"agg_func": "Max", "raw_feature_norm": "clipped", "no_txtnorm": True, "num_layers": 2},
    "scan_t2i_l1": SCAN | {"agg_func": "Mean", "raw_feature_norm": "clipped_l1norm", "bi_gru": False, "learning_rate": 5e-4},
    "scan_i2t_lse_wn": SCAN | {"cross_attn": "i2t", "precomp_enc_type": "weight_norm", "zip": False, "lambda_lse": 20.0},
    "scan_i2t_softmax": SCAN | {"cross_attn": "i2t", "raw_feature_norm": "softmax", "no_imgnorm": True, "lambda_softmax": 4.0},
}


def unit(x: Tensor, dim: int = -1) -> Tensor:
    return x / (x.pow(2).sum(dim, keepdim=True).sqrt() + 1e-8)


class ImageSide(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.fc: nn.Module = nn.Linear(c["img_dim"], c["embed_size"])
        if c.get("precomp_enc_type") == "weight_norm":
            self.fc = nn.utils.weight_norm(self.fc, dim=None)
        self.plain = c["no_imgnorm"]

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images) if self.plain else unit(self.fc(images))


class TextSide(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.embed = nn.Embedding(c["vocab_size"], c["word_dim"])
        self.name = "cap_rnn" if "module_name" in c else "rnn"
        gru = nn.GRU(c["word_dim"], c["embed_size"], c["num_layers"], batch_first=True, bidirectional=c["bi_gru"])
        self.add_module(self.name, gru)
        self.plain = c["no_txtnorm"]

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(tokens), lengths, batch_first=True)
        words = pad_packed_sequence(getattr(self, self.name)(packed)[0], batch_first=True)[0]
        if getattr(self, self.name).bidirectional:
            words = sum(words.chunk(2, -1)) / 2
        # Each caption by itself: the root of an all-zero padding row has no gradient.
        return words if self.plain else nn.utils.rnn.pad_sequence([unit(w[:n]) for w, n in zip(words, lengths, strict=True)], True)


class Global(nn.Module):
    def __init__(self, width: int, slots: int | None) -> None:
        super().__init__()
        self.embedding_local = nn.Sequential(nn.Linear(width, width), *([nn.BatchNorm1d(slots)] if slots else []), nn.Tanh())
        self.embedding_global = nn.Sequential(nn.Linear(width, width), *([nn.BatchNorm1d(width)] if slots else []), nn.Tanh())
        self.embedding_common = nn.Sequential(nn.Linear(width, 1))

    def forward(self, parts: Tensor) -> Tensor:
        agreement = self.embedding_local(parts) * self.embedding_global(parts.mean(1)).unsqueeze(1)
        weights = self.embedding_common(agreement).squeeze(2).softmax(1)
        return unit((weights.unsqueeze(2) * parts).sum(1))


class Step(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.graph_query_w, self.graph_key_w, self.sim_graph_w = (nn.Linear(size, size) for _ in range(3))

    def forward(self, z: Tensor) -> Tensor:
        edges = (self.graph_query_w(z) @ self.graph_key_w(z).transpose(1, 2)).softmax(-1)
        return self.sim_graph_w(edges @ z).relu()


class Filtration(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.attn_sim_w, self.bn = nn.Linear(size, 1), nn.BatchNorm1d(1)

    def forward(self, z: Tensor) -> Tensor:
        gates = self.bn(self.attn_sim_w(z).transpose(1, 2)).sigmoid()
        return unit((gates / (gates.abs().sum(2, keepdim=True) + 1e-8) @ z).squeeze(1))


class Similarity(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        d, s = c["embed_size"], c["sim_dim"]
        self.v_global_w, self.t_global_w = Global(d, c["regions"]), Global(d, None)
        self.sim_tranloc_w, self.sim_tranglo_w, self.sim_eval_w = nn.Linear(d, s), nn.Linear(d, s), nn.Linear(s, 1)
        if c["module_name"] == "SGR":
            self.SGR_module = nn.ModuleList(Step(s) for _ in range(c["sgr_step"]))
        else:
            self.SAF_module = Filtration(s)

    def forward(self, images: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        whole, columns = self.v_global_w(images), []
        for row, length in zip(words, lengths.tolist(), strict=True):
            caption = row[:length]
            attention = unit(F.leaky_relu(images @ caption.T, 0.1), 2)  # (I,R,L), unit over the words
            attended = unit((9 * attention.transpose(1, 2)).softmax(2) @ images)
            local = unit(self.sim_tranloc_w((attended - caption) ** 2))
            z = torch.cat([unit(self.sim_tranglo_w((whole - self.t_global_w(caption[None])) ** 2)).unsqueeze(1), local], 1)
            if hasattr(self, "SGR_module"):
                for step in self.SGR_module:
                    z = step(z)
                vector = z[:, 0]
            else:
                vector = self.SAF_module(z)
            columns.append(self.sim_eval_w(vector).sigmoid())
        return torch.cat(columns, 1)


def pair_score(c: dict[str, Any], regions: Tensor, words: Tensor) -> Tensor:
    query, context = (words, regions) if c["cross_attn"] == "t2i" else (regions, words)
    a, kind = context @ query.T, c["raw_feature_norm"]
    if kind.startswith("clipped"):
        a = F.leaky_relu(a, 0.1)
    if kind.endswith("l2norm"):
        a = unit(a, 1)
    elif kind.endswith("l1norm"):
        a = a / (a.abs().sum(1, keepdim=True) + 1e-8)
    elif kind == "softmax":
        a = a.softmax(1)
    attended = (c["lambda_softmax"] * a.T).softmax(1) @ context
    r = (query * attended).sum(1) / (query.norm(dim=1) * attended.norm(dim=1)).clamp(min=1e-8)
    match c["agg_func"]:
        case "LogSumExp":
            return (c["lambda_lse"] * r).exp().sum().log() / c["lambda_lse"]
        case "Max":
            return r.max()
        case "Sum":
            return r.sum()
    return r.mean()


def hinge(scores: Tensor, margin: float, hardest: bool) -> Tensor:
    own, off = scores.diagonal(), ~torch.eye(len(scores), dtype=torch.bool)
    to_captions, to_images = (margin + scores - own[:, None]).clamp(min=0) * off, (margin + scores - own[None]).clamp(min=0) * off
    return to_captions.amax(1).sum() + to_images.amax(0).sum() if hardest else to_captions.sum() + to_images.sum()


class Reference:
    """The parts in the authors' order, their numbers under the names of the golden arrays."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.c = config
        self.parts = [ImageSide(config), TextSide(config), *([Similarity(config)] if "module_name" in config else [])]
        for parameter in (p for part in self.parts for p in part.parameters()):
            nn.init.normal_(parameter, std=0.6)

    def state(self) -> list[Any]:
        return [{k: v.clone() for k, v in part.state_dict().items()} for part in self.parts]

    def mode(self, training: bool, dtype: torch.dtype) -> None:
        for part in self.parts:
            part.train(training).to(dtype)

    def embed(self, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.parts[0](batch[0].to(next(self.parts[0].parameters()).dtype)), self.parts[1](batch[1], batch[2])

    def scores(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        images, words = self.embed(batch)
        if len(self.parts) == 3:
            return self.parts[2](images, words, batch[2])
        rows = [[pair_score(self.c, v, w[:n]) for w, n in zip(words, batch[2], strict=True)] for v in images]
        return torch.stack([torch.stack(row) for row in rows])

    def train(self, batch: Any, test: Any, hardest: bool, dtype: torch.dtype) -> dict[str, Any]:
        name, suffix = "max" if hardest else "sum", "_f64" if dtype == torch.float64 else ""
        self.mode(True, dtype)
        parameters = [p for part in self.parts for p in part.parameters()]
        optimiser = torch.optim.Adam(parameters, lr=self.c["learning_rate"])
        found: dict[str, list[Any]] = {"losses": [], "gradnorms": [], "sims": []}
        out: dict[str, Any] = {}
        for step in range(3):
            scores = self.scores(batch)
            loss = hinge(scores, self.c["margin"], hardest)
            optimiser.zero_grad()
            loss.backward()
            if step == 0 and suffix:
                named = [(k, p.grad.clone().numpy()) for part in self.parts for k, p in part.named_parameters() if p.grad is not None]
                out |= {f"grad1_{name}|{k}": g for k, g in named}
            found["gradnorms"].append(float(nn.utils.clip_grad_norm_(parameters, self.c["grad_clip"])))
            optimiser.step()
            found["losses"].append(loss.item())
            found["sims"].append(scores.detach().double().numpy())
        out |= {f"traj_{name}_{key}{suffix}": np.array(value) for key, value in found.items()}
        self.mode(False, dtype)
        with torch.no_grad():
            out[f"traj_{name}_eval_sims{suffix}"] = self.scores(test).numpy()
        if suffix:
            out |= {f"after_{name}|{i}|{k}": v.numpy() for i, part in enumerate(self.state()) for k, v in part.items()}
        return out


def inputs(c: dict[str, Any], rows: int, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.randint(3, c["vocab_size"], (len(lengths), max(lengths)))
    tokens *= torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return torch.randn(rows, c["regions"], c["img_dim"]), tokens, torch.tensor(lengths)


def write_case(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    reference = Reference(config)
    start = reference.state()
    test = inputs(config, config.get("images", 4), config.get("captions", [7, 5, 5, 3, 2]))
    batch = inputs(config, config.get("batch", 4), [6, 5, 4, 2][: config.get("batch", 4)])
    arrays = {prefix + n: v.numpy() for prefix, b in (("", test), ("train_", batch)) for n, v in zip(INPUTS, b, strict=True)}
    for suffix, dtype in (("", torch.float32), ("_f64", torch.float64)):
        reference.mode(False, dtype)
        with torch.no_grad():
            images, words = reference.embed(test)
            mine = {"img_emb": images, "cap_emb": words, "sims": reference.scores(test)}
            scores = mine["train_batch_eval_sims"] = reference.scores(batch)
            mine |= {f"loss_eval_{n}": hinge(scores, config["margin"], n == "max").double() for n in ("max", "sum")}
        arrays |= {key + suffix: value.numpy() for key, value in mine.items()}
        for hardest in (True, False):
            for part, state in zip(reference.parts, start, strict=True):
                part.load_state_dict(state)
            arrays |= reference.train(batch, test, hardest, dtype)
            for part, state in zip(reference.parts, start, strict=True):
                part.load_state_dict(state)
    np.savez(folder / "arrays.npz", **arrays)
    about = {"kind": "sgraf" if "module_name" in config else "scan", "config": config, "num_region": config["regions"]}
    (folder / "README.json").write_text(json.dumps(about))
    content = {"epoch": 1, "model": start, "best_rsum": 1.5, "opt": argparse.Namespace(**config), "Eiters": 3}
    torch.save(content, folder / "model_best.pth.tar", _use_new_zipfile_serialization=config["zip"])


INPUTS = ("images", "captions", "lengths")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("name", CASES)
def test_a_folder_of_any_configuration_replays(tmp_path: Path, name: str):
    write_case(tmp_path / name, BASE | CASES[name])
    (case,) = find(tmp_path)
    checks = list(case.run())
    failed = {check.name: check.differences()[:2] for check in checks if not check.differences()[2]}
    assert not failed
    assert len(checks) > 50


def soft_config(**changes: Any) -> dict[str, Any]:
    """The shipped soft-label loss with changes named as "cross_softlabel.rate"."""
    taus = {f"{p}{side}_tau{end}": v for p in ("", "the_softlabel_") for side in ("image", "text") for end, v in TAU.items()}
    soft = taus | {"is_on": True, "rate": 0.5, "use_loss": "kl", "contrastive_loss_mode": "mean"}
    soft |= {"use_same_tau": False, "is_block_tau": False, "use_same_softlabel_tau": False, "is_block_softlabel_tau": True}
    uni = soft | {"use_cross_softlabel_same_tau": False, "use_cross_softlabel_same_softlabel_tau": False}
    itc = {"is_on": True, "is_block_tau": False, "tau": 0.05, "tau_min": 0.01, "tau_max": 0.1, "rate": 1.0, "contrastive_loss_mode": "mean"}
    config = {"contrastive": itc, "cross_softlabel": soft | {"cross_softlabel_mode": "each"}, "uni_softlabel": uni}
    for name, value in changes.items():
        part, _, key = name.partition("__")
        config[part] = {**config[part], key: value}
    return config


TAU = {"": 0.45, "_min": 0.1, "_max": 1.0}
OFF = {"contrastive__is_on": False}
CUSA_CASES: dict[str, dict[str, Any]] = {
    "csa_alone_add": OFF | {"uni_softlabel__is_on": False, "cross_softlabel__cross_softlabel_mode": "add"},
    "usa_alone_frozen": OFF | {"cross_softlabel__is_on": False, "uni_softlabel__is_block_tau": True, "uni_softlabel__text_tau": 1.5},
    "zero_teacher": {"uni_softlabel__rate": 2.0},
    "dot_sums": {"cross_softlabel__cross_softlabel_mode": "dot", "cross_softlabel__use_loss": "contrastive"},
    "head_without_uni": {"uni_softlabel__is_on": False, "contrastive__contrastive_loss_mode": "sum"},
}


def directions(x: Tensor, y: Tensor, tau: Tensor, mode: str) -> Tensor:
    """KL, or soft cross entropy with sum or mean, of one direction, entry by entry."""
    log_p, total = (x / tau).log_softmax(1), x.new_zeros(())
    for i in range(len(x)):
        for j in range(len(x)):
            total = total + y[i, j] * ((y[i, j].log() if mode == "kl" else 0) - log_p[i, j])
    return total / (len(x) ** 2 if mode == "mean" else len(x))


def cusa_numbers(config: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """losses, used temperatures and gradients in float64."""
    leaves = {k[3:]: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in arrays.items() if k[:8] in FEATURES}
    weights = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in arrays.items() if k.startswith("param_")}

    def feature(head: str, side: str) -> Tensor:
        if not weights:
            return F.normalize(leaves[f"{head}_{side}"])
        z, names = leaves[f"clip_{side}"], [f"param_{p}{head}_{side}_projection_{w}" for p in ("ln_", "") for w in ("weight", "bias")]
        scale, shift, matrix, bias = (weights[n] for n in names)
        return F.normalize(F.linear(F.layer_norm(z, z.shape[-1:], scale, shift), matrix, bias))

    itc, csa, usa = config["contrastive"], config["cross_softlabel"], config["uni_softlabel"]
    cosines = [a @ a.T for a in (F.normalize(torch.tensor(arrays[f"in_teacher_{s}"], dtype=torch.float64)) for s in ("image", "text"))]
    taus: dict[str, Tensor] = {}
    losses = dict.fromkeys(("contrastive", "cross_modal", "uni_modal"), torch.zeros((), dtype=torch.float64))

    def tau(name: str, value: float, low: float, high: float, frozen: bool) -> Tensor:
        return taus.setdefault(name, torch.tensor(min(max(value, low), high), dtype=torch.float64, requires_grad=not frozen))

    def soft(given: dict[str, Any], label: str, students: list[Tensor], targets: list[Tensor], shared: bool) -> Tensor:
        total = 0
        for k, side in enumerate(("image", "text")):
            pair = []
            for role, block in (("", "is_block_tau"), ("the_softlabel_", "is_block_softlabel_tau")):
                value, low, high = (given[f"{role}{side}_tau{end}"] for end in ("", "_min", "_max"))
                pair.append(tau(f"{label}_{role}tau{'' if shared else f'_{side}'}", value, low, high, given[block]))
            kind = "kl" if given["use_loss"] == "kl" else given["contrastive_loss_mode"]
            total = total + directions(students[k], (targets[k] / pair[1]).softmax(1), pair[0], kind)
        return given["rate"] * total / 2

    if itc["is_on"] or csa["is_on"]:
        scores = feature("cross", "image") @ feature("cross", "text").T
    if itc["is_on"]:
        same = torch.tensor(arrays["in_idx"][:, None] == arrays["in_idx"][None]).double()
        t = tau("tau", itc["tau"], itc["tau_min"], itc["tau_max"], itc["is_block_tau"])
        rows = [directions(x, same / same.sum(1, keepdim=True), t, itc["contrastive_loss_mode"]) for x in (scores, scores.T)]
        losses["contrastive"] = itc["rate"] * (rows[0] + rows[1]) / 2
    if csa["is_on"]:
        mode, (image, text) = csa["cross_softlabel_mode"], cosines
        mixed = (image + text) / 2 if mode == "add" else (image.clamp(min=0) * text.clamp(min=0)).sqrt()
        losses["cross_modal"] = soft(csa, "cross", [scores, scores.T], cosines if mode == "each" else [mixed, mixed], mode != "each")
    if usa["is_on"]:
        uni = [feature("uni", side) for side in ("image", "text")]
        losses["uni_modal"] = soft(usa, "uni", [u @ u.T for u in uni], cosines, False)
    total = sum(losses.values())
    total.backward()
    out: dict[str, Any] = {f"loss_{k}": v for k, v in losses.items()} | {"loss_total": total}
    out |= {f"used_{k}": v for k, v in taus.items()} | {f"grad_{k}": v.grad for k, v in taus.items() if v.requires_grad}
    out |= {f"grad_{k}": torch.zeros_like(v) if v.grad is None else v.grad for k, v in (leaves | weights).items()}
    return {f"f64_{k}": v.detach().numpy() for k, v in out.items()}


FEATURES = ("in_cross", "in_uni_i", "in_uni_t", "in_clip_")


@pytest.mark.parametrize("name", CUSA_CASES)
def test_a_soft_label_loss_of_any_configuration_replays(tmp_path: Path, name: str):
    config, rows, width = soft_config(**CUSA_CASES[name]), 5, 6
    arrays = {f"in_teacher_{side}": torch.randn(rows, w).numpy() for side, w in (("image", 9), ("text", 4))}
    arrays["in_idx"] = np.arange(rows)
    if name == "zero_teacher":
        arrays["in_teacher_image"] = np.zeros((rows, 1), np.float32)
    if name.startswith("head"):
        arrays |= {f"in_clip_{side}": torch.randn(rows, width).numpy() for side in ("image", "text")}
        shapes = {"ln_cross": (width,), "cross": (width, width)}
        for head, shape in shapes.items():
            for side in ("image", "text"):
                arrays[f"param_{head}_{side}_projection_weight"] = torch.randn(shape).numpy()
                arrays[f"param_{head}_{side}_projection_bias"] = torch.randn(width).numpy()
    else:
        arrays |= {f"in_{head}_{side}": torch.randn(rows, width).numpy() for head in ("cross", "uni") for side in ("image", "text")}
    np.savez(tmp_path / f"{name}.npz", **arrays, **cusa_numbers(config, arrays))
    (tmp_path / "README.json").write_text(json.dumps({"cases": {name: {"loss_config": config}}}))
    (case,) = cusa.find(tmp_path)
    checks = list(case.run())
    assert {check.name: check.differences()[:2] for check in checks if not check.differences()[2]} == {}
    assert len(checks) > 10
