"""All scores without gradient and few pairs with it: losses, gradients, running values and thresholds of the plain way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from itm.matchers.late.scan import SCAN
from itm.matchers.late.sgraf import SAF, SGR
from itm.matchers.late.uarda import UARDA
from itm.methods.hardest_pairs import loss_of_few
from itm.methods.matching import Matching
from itm.methods.triplet import TripletOptions, TripletTerm
from itm.types import Batch, Matcher, SplitScore
from tests.support.late_worlds import SMALL, captions_of, images_of

MATCHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "scan t2i": (SCAN, {}),
    "scan i2t": (SCAN, {"cross_attn": "i2t", "agg_func": "Mean", "lambda_softmax": 4.0}),
    "scan max": (SCAN, {"agg_func": "Max", "raw_feature_norm": "l2norm"}),
    "sgr": (SGR, {"sim_dim": 5, "regions": 4, "dropout": 0.4}),
    "uarda": (UARDA, {"threshold": {"min_words": 4}}),
    "uarda both": (UARDA, {"direction": "both", "threshold": {"min_words": 4, "mismatch": "hardest"}}),
}
LENGTHS = [7, 3, 3, 6, 1, 4, 7, 2]


def batch(ids: list[int] | None = None) -> Batch:
    """Eight pairs, some of whose regions are padded."""
    images, captions = images_of(8, 4, [4, 4, 3, 4, 1, 4, 2, 4]), captions_of(LENGTHS)
    own = torch.tensor(ids or list(range(8)))
    images = type(images)(own, regions=images.regions, mask=images.mask)
    return Batch(images, type(captions)(captions.tokens, captions.mask, own))


def matcher_of(name: str, dtype: torch.dtype, **more: Any) -> Matcher:
    kind, options = MATCHERS[name]
    dropout = {"text": {**SMALL["text"], "dropout": 0.3}} if kind is SGR else {}
    matcher: Matcher = kind(**{**SMALL, **options, **more, **dropout}).to(dtype)
    for parameter in matcher.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    if isinstance(matcher, UARDA):
        for state in matcher.thresholds.values():
            state.t.fill_(0.3)
    return matcher


def step_of(method: Matching, given: Batch, few: bool, step: int = 0) -> dict[str, torch.Tensor]:
    """One loss and backward pass of a copy: the loss, gradients, and the state it leaves. Dropout draws the same numbers each time."""
    method = copy.deepcopy(method).train()
    method.hardest_pairs = few
    torch.manual_seed(3)
    losses = method(given, step=step)
    torch.stack(list(losses.values())).sum().backward()
    found = {f"loss {name}": value.detach() for name, value in losses.items()}
    found |= {f"gradient of {name}": p.grad for name, p in method.named_parameters() if p.grad is not None}
    return found | {f"after {name}": value for name, value in method.state_dict().items()} | {"draws": torch.rand(2)}


def to(given: Batch, dtype: torch.dtype) -> Batch:
    assert given.images.regions is not None
    images = type(given.images)(given.images.image_id, regions=given.images.regions.to(dtype), mask=given.images.mask)
    return Batch(images, given.captions)


def close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    largest = max(float(v.abs().max()) for name, v in want.items() if name.startswith("gradient"))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=tolerance * max(1.0, largest), rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs were scored with gradient in each step that took the two passes."""
    seen: list[int] = []
    for kind in (SCAN, SGR, UARDA):
        plain = kind.split_score

        def counted(self: Any, images: Any, captions: Any, plain: Any = plain) -> Any:
            found = plain(self, images, captions)
            if found is None:
                return None
            return found._replace(of_pairs=lambda rows, columns: (seen.append(len(rows)), found.of_pairs(rows, columns))[1])

        monkeypatch.setattr(kind, "split_score", counted)
    return seen


@pytest.mark.parametrize("name", MATCHERS)
def test_the_gradients_are_those_of_all_pairs(name: str, split: list[int]):
    method, given = Matching(matcher_of(name, torch.float64), loss="triplet"), to(batch(), torch.float64)
    close(step_of(method, given, True), step_of(method, given, False), 1e-12)
    assert split and 1 <= split[0] <= 3 * 8 < 8 * 8


@pytest.mark.parametrize("name", MATCHERS)
def test_float32_gradients_are_as_near_to_float64_as_those_of_all_pairs(name: str, split: list[int]):
    matcher, given = matcher_of(name, torch.float64), batch()
    narrow = Matching(copy.deepcopy(matcher).float(), loss="triplet")
    exact = step_of(Matching(matcher, loss="triplet"), to(given, torch.float64), False)
    few, every = step_of(narrow, given, True), step_of(narrow, given, False)
    norm = lambda found, other: sum(float((found[n] - other[n]).square().sum()) for n in exact if n.startswith("gradient")) ** 0.5
    size = norm(exact, {name: torch.zeros(()) for name in exact})
    assert norm(few, exact) <= 2 * norm(every, exact) + 1e-6 * size
    torch.testing.assert_close(few["loss triplet"], every["loss triplet"], atol=1e-5, rtol=0)
    assert split


@pytest.mark.parametrize("options", [{"official": True}, {"reduction": "mean", "weight": 0.5}, {"margin": 0.01}])
def test_images_with_several_captions_and_other_options_of_the_loss(options: dict[str, Any], split: list[int]):
    method, given = (
        Matching(matcher_of("sgr", torch.float64), loss="triplet", **options),
        to(batch([0, 1, 0, 2, 3, 1, 4, 5]), torch.float64),
    )
    close(step_of(method, given, True), step_of(method, given, False), 1e-12)
    assert split


def test_each_of_two_equal_hardest_negatives_takes_its_share_of_the_gradient():
    table = torch.tensor([[0.5, 0.4, 0.4], [0.4, 0.6, 0.1], [0.4, 0.1, 0.6]], dtype=torch.float64, requires_grad=True)
    term, positives = TripletTerm(TripletOptions()), torch.eye(3, dtype=torch.bool)
    (want,) = torch.autograd.grad(term(table, positives), table)
    assert float(want[0, 1]) == float(want[0, 2]) > 0
    split = SplitScore(table.detach(), lambda rows, columns: table[rows, columns])
    loss = loss_of_few(split, term, positives, 0)
    assert torch.equal(torch.autograd.grad(loss, table)[0], want)
    assert float(loss.detach()) == float(term(table, positives).detach())


@pytest.mark.parametrize("name", ["scan t2i", "scan i2t", "uarda"])
def test_ties_share_the_gradient_as_they_do_among_all_pairs(name: str, split: list[int]):
    given = to(batch(), torch.float64)
    twice = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1])  # two images and two captions come twice, each as another pair
    regions, mask = given.images.regions[twice], given.images.mask[twice]
    tokens, words = given.captions.tokens[twice], given.captions.mask[twice]
    given = Batch(type(given.images)(torch.arange(8), regions=regions, mask=mask), type(given.captions)(tokens, words, torch.arange(8)))
    method = Matching(matcher_of(name, torch.float64), loss="triplet")
    close(step_of(method, given, True), step_of(method, given, False), 1e-12)
    assert split


def test_a_batch_without_any_violation_still_gives_every_weight_a_gradient_of_zero(split: list[int]):
    method, given = Matching(matcher_of("sgr", torch.float64), loss="triplet", margin=-2.0), to(batch(), torch.float64)
    got, want = step_of(method, given, True), step_of(method, given, False)
    close(got, want, 0.0)
    assert split == [1] and all(not v.any() for name, v in got.items() if name.startswith("gradient"))


def test_running_the_pairs_again_in_the_backward_pass_changes_nothing(split: list[int]):
    for name in ("scan i2t", "sgr", "uarda both"):
        method, given = Matching(matcher_of(name, torch.float64), loss="triplet"), to(batch(), torch.float64)
        want = step_of(method, given, True)
        method.matcher.recompute = True
        close(step_of(method, given, True), want, 1e-12)
    assert len(split) == 6


def test_chunks_of_pairs_change_nothing(monkeypatch: pytest.MonkeyPatch):
    method, given = Matching(matcher_of("sgr", torch.float64), loss="triplet"), to(batch(), torch.float64)
    want = step_of(method, given, True)
    monkeypatch.setattr("itm.matchers.late.pairs.WORDS", 9)
    close(step_of(method, given, True), want, 1e-12)


@pytest.mark.parametrize(
    ("why", "name", "loss"),
    [
        ("the first steps sum all negatives", "sgr", {"loss": "triplet", "warmup_steps": 5}),
        ("all negatives are summed", "sgr", {"loss": "triplet", "hardest": False}),
        ("a softmax reaches every pair", "sgr", {"loss": "contrastive"}),
    ],
)
def test_a_loss_that_reaches_all_pairs_keeps_their_gradient(why: str, name: str, loss: dict[str, Any], split: list[int]):
    method, given = Matching(matcher_of(name, torch.float64), **loss), to(batch(), torch.float64)
    close(step_of(method, given, True), step_of(method, given, False), 0.0)
    assert not split, why


def test_the_two_passes_begin_after_the_warm_up(split: list[int]):
    method, given = Matching(matcher_of("sgr", torch.float64), loss="triplet", warmup_steps=5), to(batch(), torch.float64)
    close(step_of(method, given, True, step=5), step_of(method, given, False, step=5), 1e-12)
    assert split


def test_pairs_that_depend_on_each_other_are_not_split():
    given = to(batch(), torch.float64)
    coupled: list[Any] = [SAF(**SMALL, sim_dim=5, regions=4), UARDA(**SMALL, threshold={"mode": "naaf_compat"})]
    coupled += [UARDA(**SMALL, separation={"weight": 0.02}), SCAN(**SMALL, raw_feature_norm="softmax")]
    for matcher in coupled:
        matcher.double().train()
        assert matcher.split_score(matcher.encode_images(given.images), matcher.encode_captions(given.captions)) is None


def test_autocast_keeps_the_gradient_of_all_pairs(split: list[int]):
    method = Matching(matcher_of("scan t2i", torch.float32), loss="triplet")
    with torch.autocast("cpu", torch.bfloat16):
        method(batch())
    assert not split
