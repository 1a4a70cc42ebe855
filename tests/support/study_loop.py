"""A training loop of plain torch on the vectors that the dual encoder of the study reads: seconds a run, so that many settings can be
tried, and an independent check of the pipeline's own runs. Losses are written out here once more; only data and metrics are shared.

Choices are made on folds of train: a sixth of its photos is held out.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from itm.data import files
from itm.data.records import Regions
from itm.data.shards import Sample, read_manifest, read_samples
from itm.data.text import HFTokenizer
from itm.evaluation.metrics import retrieval_metrics
from itm.matchers.encoders.build import build_text_encoder
from itm.types import Captions

FOLDS = 6


@dataclass(frozen=True)
class Vectors:
    """Photos (N,1280), captions (T,384) and the photo of each caption (T,)."""

    images: Tensor
    texts: Tensor
    owner: Tensor

    def only(self, wanted: Tensor) -> Vectors:
        """Those photos (N,) bool with their captions."""
        kept = wanted[self.owner]
        return Vectors(self.images[wanted], self.texts[kept], (torch.cumsum(wanted, 0) - 1)[self.owner[kept]])

    def fold(self, held_out: int) -> tuple[Vectors, Vectors]:
        """What is trained on, and what is held out: every sixth photo."""
        held = torch.arange(len(self.images)) % FOLDS == held_out
        return self.only(~held), self.only(held)


@dataclass(frozen=True)
class Setting:
    """How the loop trains. tau: of InfoNCE, learned where `learn`; student: temperature of CSA's and USA's students, a number that is
    learned, or None for InfoNCE's own; teacher: the teacher's temperature; cosine: the rate falls to 0."""

    tau: float = 0.07
    learn: bool = True
    student: float | None = None
    teacher: float = 0.2
    csa: float = 0.0
    usa: float = 0.0
    shuffled: bool = False
    steps: int = 300
    batch: int = 128
    cosine: bool = True


class Student(nn.Module):
    """One linear layer a side, and temperatures."""

    def __init__(self, setting: Setting, widths: tuple[int, int]) -> None:
        super().__init__()
        self.setting = setting
        self.image, self.text = (nn.Linear(width, 256) for width in widths)
        self.tau = nn.Parameter(torch.tensor(setting.tau), requires_grad=setting.learn)
        self.students = nn.ParameterList(nn.Parameter(torch.tensor(setting.student or 1.0)) for _ in range(3))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1)

    def clamp_(self) -> None:
        with torch.no_grad():
            self.tau.clamp_(0.01, 0.1)
            for tau in self.students:
                tau.clamp_(0.1, 1.0)

    def temperatures(self) -> list[Tensor]:
        """Of CSA, of USA's images, of USA's captions."""
        return [self.tau] * 3 if self.setting.student is None else list(self.students)


def trained(setting: Setting, train: Vectors, seed: int) -> Student:
    torch.manual_seed(seed)
    student, teacher = Student(setting, (train.images.shape[1], train.texts.shape[1])), teacher_of(train, setting.shuffled)
    optimiser = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3, weight_decay=1e-4)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(setting.steps):
        if len(order) < setting.batch:
            order = torch.randperm(len(train.texts))
        rows, order = order[: setting.batch], order[setting.batch :]
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * (0.5 * (1 + math.cos(math.pi * step / setting.steps)) if setting.cosine else 1.0)
        student.clamp_()
        loss = loss_of(student, train, rows, [side[rows] for side in teacher])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return student


def teacher_of(train: Vectors, shuffled: bool) -> list[Tensor]:
    """Unit vectors of the photo and of the text of each caption; shuffled: those of another photo, and of one of its captions."""
    images = F.normalize(train.images - train.images.mean(0), dim=1)[train.owner]
    texts = F.normalize(train.texts, dim=1)
    if not shuffled:
        return [images, texts]
    count = len(train.images)
    cycle = torch.randperm(count, generator=torch.Generator().manual_seed(7))
    donor = torch.empty(count, dtype=torch.int64)
    donor[cycle] = cycle.roll(1)
    first = torch.searchsorted(train.owner, torch.arange(count))
    captions = torch.bincount(train.owner, minlength=count)
    theirs = donor[train.owner]
    rows = first[theirs] + (torch.arange(len(texts)) - first[train.owner]) % captions[theirs]
    return [images[rows], texts[rows]]


def loss_of(student: Student, train: Vectors, rows: Tensor, teacher: list[Tensor]) -> Tensor:
    """InfoNCE with several positives + CSA + USA, each a mean over the rows and the two directions."""
    owner, setting = train.owner[rows], student.setting
    images, texts = student(train.images[owner], train.texts[rows])
    scores = images @ texts.T
    same = (owner[:, None] == owner[None, :]).float()
    hard = same / same.sum(1, keepdim=True)
    loss = (_cross_entropy(scores, student.tau, hard) + _cross_entropy(scores.T, student.tau, hard)) / 2
    soft = [F.softmax(side @ side.T / setting.teacher, dim=1) for side in teacher]
    csa, *usa = student.temperatures()
    pairs = {"csa": zip((scores, scores.T), (csa, csa), soft, strict=True)}
    pairs["usa"] = zip((images @ images.T, texts @ texts.T), usa, soft, strict=True)
    for weight, term in ((setting.csa, "csa"), (setting.usa, "usa")):
        if weight:  # the entropy of the teacher is a constant, so that KL and cross entropy have one gradient
            loss = loss + weight * torch.stack([_cross_entropy(x, tau, target) for x, tau, target in pairs[term]]).mean()
    return loss


def _cross_entropy(scores: Tensor, tau: Tensor, target: Tensor) -> Tensor:
    return -(target * F.log_softmax(scores / tau, dim=1)).sum() / len(scores)


@torch.no_grad()
def rsum(student: Student, asked: Vectors) -> float:
    images, texts = student(asked.images, asked.texts)
    positives = torch.arange(len(images))[:, None] == asked.owner[None, :]
    return float(retrieval_metrics(images @ texts.T, positives)["rsum"])


def vectors_of(folder: str, kept: Path) -> Vectors:
    """Of a split of region shards: the mean of the cells of each photo, and the frozen tower's vector of each caption. Kept in a file."""
    if not kept.exists():
        images, texts, owner, tower = [], [], [], _Sentences()
        for shard in read_manifest(folder).shards:
            for sample in read_samples(f"{folder}/{shard.name}"):
                if isinstance(sample, Sample) and sample.regions is not None:
                    images.append(Regions.from_npz(sample.regions).features.astype(np.float32).mean(0))
                    texts.append(tower([caption.text for caption in sample.captions]))
                    owner += [len(images) - 1] * len(sample.captions)
        np.savez(kept, images=np.stack(images), texts=np.concatenate(texts), owner=np.array(owner))
    with np.load(kept, allow_pickle=False) as held:
        return Vectors(*(torch.from_numpy(held[name]) for name in ("images", "texts", "owner")))


class _Sentences:
    """The frozen MiniLM as the matchers of the study hold it: the mean of the words, not normalised."""

    def __init__(self) -> None:
        self.tokenizer = HFTokenizer("minilm", max_length=32, clean=False)
        self.tower = build_text_encoder(vocab_size=self.tokenizer.vocab_size, kind="hf_text", path="minilm", freeze=True).eval()

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> np.ndarray:
        tokens, mask = self.tokenizer(texts)
        vectors = self.tower(Captions(tokens, mask, torch.arange(len(texts)))).vector
        return np.asarray(vectors)


TAUS = (0.1, 0.2)
SETTINGS = {
    "learned, InfoNCE's own": Setting(),
    "learned, 0.45 learned": Setting(student=0.45),
    "fixed 0.05, 0.45 learned": Setting(tau=0.05, learn=False, student=0.45),
    "fixed 0.05, 0.45 learned, 600 steps of one rate": Setting(tau=0.05, learn=False, student=0.45, steps=600, cosine=False),
}
"""By what the table says of them: the temperature of InfoNCE, that of the students."""
CHOSEN = "fixed 0.05, 0.45 learned"
"""What the dual encoder of the study takes: the best with the true teacher, on the folds."""


def arms(setting: Setting) -> dict[str, Setting]:
    """The columns of the table."""
    found = {"base": setting}
    for tau in TAUS:
        for name, shuffled in (("shuffled", True), ("CUSA", False)):
            found[f"{name} {tau:g}"] = replace(setting, teacher=tau, csa=1, usa=1, shuffled=shuffled)
    return found


def explored(train: Vectors, folder: Path, folds: tuple[int, ...], seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """rSum of every setting and arm on each fold with each seed; those that lie in the folder already are not made again."""
    found = []
    for number, (name, setting) in enumerate(SETTINGS.items()):
        for arm, chosen in arms(setting).items():
            for held_out in folds:
                for seed in seeds:
                    path = folder / f"{number}-{arm.replace(' ', '-')}-{held_out}-{seed}.json"
                    if not path.exists():
                        learnt, held = train.fold(held_out)
                        value = rsum(trained(chosen, learnt, seed), held)
                        said = {"setting": name, "on": "fold", "arm": arm, "fold": held_out, "seed": seed, "rsum": value}
                        files.write_atomic(str(path), json.dumps(said).encode())
                    found.append(json.loads(path.read_text()))
    return found


def checked(train: Vectors, asked: Vectors, folder: Path, seeds: tuple[int, ...]) -> None:
    """The chosen setting on val, for comparison with the pipeline's runs of the same."""
    chosen = replace(SETTINGS[CHOSEN], teacher=0.2)
    soft = {"USA alone": replace(chosen, usa=1), "CSA alone": replace(chosen, csa=1), "CUSA": replace(chosen, csa=1, usa=1)}
    for seed in seeds:
        for arm, setting in {"base": chosen, **soft, "shuffled": replace(soft["CUSA"], shuffled=True)}.items():
            path = folder / f"val-{arm.replace(' ', '-')}-{seed}.json"
            if not path.exists():
                said = {"setting": CHOSEN, "on": "val", "arm": arm, "seed": seed, "rsum": rsum(trained(setting, train, seed), asked)}
                files.write_atomic(str(path), json.dumps(said).encode())


LENGTHS = ((32, 300), (32, 1200), (64, 600), (128, 300))


def lengthened(train: Vectors, asked: Vectors, folder: Path, seeds: tuple[int, ...]) -> None:
    """The chosen setting on val with other batches and numbers of steps: how much must be seen before labels of other photos harm."""
    for (batch, steps), seed in itertools.product(LENGTHS, seeds):
        chosen = replace(SETTINGS[CHOSEN], teacher=0.2, batch=batch, steps=steps)
        soft = replace(chosen, csa=1, usa=1)
        for arm, setting in {"base": chosen, "shuffled": replace(soft, shuffled=True), "CUSA": soft}.items():
            path = folder / f"length-{batch}-{steps}-{arm}-{seed}.json"
            if not path.exists():
                name = f"{steps:,} steps of {batch}"
                said = {"setting": name, "on": "length", "arm": arm, "seed": seed, "rsum": rsum(trained(setting, train, seed), asked)}
                files.write_atomic(str(path), json.dumps(said).encode())
