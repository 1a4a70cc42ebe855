"""Two real processes (gloo) that gather must equal one process on the concatenated batch: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from itm.matchers.dual import cosines
from itm.methods.cusa import CUSA
from itm.methods.matching import Matching
from itm.types import Batch, Captions, Encoded, Images, Matcher, SoftLabels
from tests.support.ranks import joined, spawn_ranks

ROWS, WORLD = 3, 2
IDS = torch.tensor([0, 1, 2, 1, 4, 0])


class Linears(Matcher):
    """Two linear towers; late interaction when asked (parts, ragged over ranks)."""

    vector_width = 4
    uni_width = 0

    def __init__(self, parts: bool) -> None:
        super().__init__()
        self.parts = parts
        self.image, self.text = nn.Linear(5, 4), nn.Linear(5, 4)

    def _encode(self, layer, x, mask):
        out = F.normalize(layer(x), dim=-1) * mask.unsqueeze(-1)
        vector = F.normalize(out.sum(1), dim=-1)
        return Encoded(vector=vector, parts=out, mask=mask) if self.parts else Encoded(vector=vector)

    def encode_images(self, images):
        return self._encode(self.image, images.regions, images.mask)

    def encode_captions(self, captions):
        longest = int(captions.mask.sum(1).max())
        x = F.one_hot(captions.tokens[:, :longest], 5).to(self.text.weight.dtype)
        return self._encode(self.text, x, captions.mask[:, :longest])

    def score(self, images, captions):
        if not self.parts:
            return cosines(images, captions)
        return torch.einsum("ird,tld->itrl", images.parts, captions.parts).amax(2).sum(-1) / captions.mask.sum(1)


def batch():
    g = torch.Generator().manual_seed(3)
    rows = ROWS * WORLD
    mask = torch.arange(4) < torch.tensor([[2], [3], [1], [4], [2], [3]])
    images = Images(IDS, regions=torch.randn(rows, 2, 5, generator=g, dtype=torch.float64), mask=torch.ones(rows, 2, dtype=torch.bool))
    captions = Captions(torch.randint(0, 5, (rows, 4), generator=g), mask, IDS)
    teacher = SoftLabels(*(torch.randn(rows, 6, generator=g, dtype=torch.float64) for _ in range(2)))
    return Batch(images, captions, teacher)


def method(name, gather):
    torch.manual_seed(5)
    torch.set_default_dtype(torch.float64)
    matcher = Linears(parts=name == "parts")
    if name == "triplet":
        return Matching(matcher, loss="triplet", margin=0.4, gather=gather)
    free = {"image": 0.6, "text": 0.8, "shared": False, "learn": True}
    return CUSA(matcher, csa={"mode": "each" if name == "each" else name if name != "parts" else "add", "teacher": free}, gather=gather)


def run(module, b):
    losses = module(b)
    torch.stack(list(losses.values())).sum().backward()
    plain = getattr(module, "module", module)
    grads = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    return {name: value.detach() for name, value in losses.items()}, grads


def worker(rank, port, names, queue):
    with joined(rank, port, WORLD):
        b, own = batch(), slice(rank * ROWS, (rank + 1) * ROWS)
        mine = Batch(b.images[own], b.captions[own], b.teacher[own])
        for name in names:
            losses, grads = run(DistributedDataParallel(method(name, True)), mine)
            queue.put((name, rank, {k: v.item() for k, v in losses.items()}, {k: v.tolist() for k, v in grads.items()}))


@pytest.mark.e2e
def test_two_gathering_ranks_equal_one_process_on_the_whole_batch():
    names = ["each", "dot", "parts", "triplet"]
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    spawn_ranks(worker, WORLD, names, queue)
    before = torch.get_default_dtype()
    try:
        wanted = {name: run(method(name, False), batch()) for name in names}
    finally:
        torch.set_default_dtype(before)
    for _ in range(len(names) * WORLD):
        name, rank, losses, grads = queue.get()
        want_losses, want_grads = wanted[name]
        assert losses.keys() == want_losses.keys()
        assert grads.keys() == want_grads.keys()
        for key, value in losses.items():
            assert value == pytest.approx(want_losses[key].item(), abs=1e-12), (name, rank, key)
        for key, value in grads.items():
            torch.testing.assert_close(
                torch.tensor(value, dtype=torch.float64), want_grads[key], atol=1e-12, rtol=1e-10, msg=f"{name} {key}"
            )
