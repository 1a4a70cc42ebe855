"""IAIS: mining, groups, weights, what it composes with and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from itm.benchmarks.published_loops import iais_half
from itm.losses.relation import relation_alignment_loss
from itm.matchers.clip import CLIP
from itm.matchers.dual import DualEncoder
from itm.matchers.joint.uniter import UNITER
from itm.matchers.late.scan import SCAN
from itm.matchers.relations import cosine_relations
from itm.methods.iais import IAIS, annealing
from itm.methods.iais_mining import first_of_each, hardest_in_batch, mining_mode
from itm.types import Batch, Captions, Encoded, Images
from tests.support.iais_pools import hardest_of_pool, pool_step

ID = torch.tensor([0, 1, 1, 2, 3])


def batch(ids: torch.Tensor = ID) -> Batch:
    """Caption k is about the image of row k; image rows of one id are equal."""
    generator = torch.Generator().manual_seed(3)
    regions, boxes = torch.randn(9, 4, 6, generator=generator)[ids], torch.rand(9, 4, 7, generator=generator)[ids]
    lengths = torch.randint(3, 8, (len(ids),), generator=generator)
    mask = torch.arange(8) < lengths[:, None]
    tokens = torch.randint(1, 30, (len(ids), 8), generator=generator) * mask
    return Batch(Images(ids, None, regions, boxes, torch.ones(len(ids), 4).bool()), Captions(tokens, mask, ids))


def uniter(dropout: float = 0.0, scale: float = 0.3) -> UNITER:
    model = UNITER(vocab_size=30, hidden=16, layers=2, heads=2, positions=10, dropout=dropout, region_dim=6)
    for p in model.parameters():
        p.data += scale * torch.randn_like(p)
    return model


def test_a_step_is_the_loop_over_positives_and_their_hardest_negatives():
    model, given = uniter(), batch()
    method = IAIS(model, weight=2.0, schedule="constant", ranking={"hard_negatives": 2, "margin": 0.3})
    terms = method(given)
    with torch.no_grad():
        images, captions = model.encode_images(given.images), model.encode_captions(given.captions)
        scores = model.score(images, captions).sigmoid()
        relations = model.pairs(images, captions, torch.arange(5)).relations
    sums = {"rank_image": [], "rank_text": []}
    for k in range(5):
        captions_of = [float(scores[k, t]) for t in range(5) if ID[t] != ID[k]]
        images_of = [float(scores[i, k]) for i in (0, 1, 3, 4) if ID[i] != ID[k]]
        for name, values in (("rank_image", captions_of), ("rank_text", images_of)):
            sums[name] += [max(0.0, 0.3 + v - float(scores[k, k])) for v in sorted(values)[-2:]]
    for name, values in sums.items():
        assert terms[name].item() == pytest.approx(sum(values) / len(values), abs=1e-5)
    for side, anchor in (("image", "V"), ("text", "L")):
        want = relation_alignment_loss(relations.blocks, relations.word_mask, relations.region_mask, anchor=anchor)
        assert terms[f"iais_{side}"].item() == pytest.approx(2 * want.item(), abs=1e-5)


def test_a_row_with_fewer_negatives_than_asked_counts_only_the_real_ones():
    scores = torch.tensor([[5.0, 4.0, 3.0], [1.0, 9.0, 2.0]])
    columns, real = hardest_in_batch(scores, torch.tensor([[False, True, False], [True, False, True]]), keep=7)
    assert columns[:, 0].tolist() == [1, 2]
    assert columns[1, 1] == 0
    assert real.tolist() == [[True, False], [True, True]]


def test_the_softmax_ranking_is_the_cross_entropy_of_the_positive_within_its_group():
    model, given = uniter(), batch()
    got = IAIS(model, weight=0, ranking={"loss": "softmax", "hard_negatives": 9})(given)["rank_image"]
    with torch.no_grad():
        scores = model.score(model.encode_images(given.images), model.encode_captions(given.captions))
    allowed = (ID[:, None] != ID[None, :]) | torch.eye(5).bool()
    want = -scores.masked_fill(~allowed, -torch.inf).log_softmax(1).diagonal().mean()
    assert got.item() == pytest.approx(want.item(), abs=1e-5)


def test_the_first_random_steps_draw_negatives_without_scoring_the_batch():
    model, given = uniter(), batch(torch.arange(5))
    method = IAIS(model, weight=0, ranking={"hard_negatives": 1, "random_steps": 2})
    mined = [method._mine(given, step)["V"][0] for step in [0] * 12 + [2] * 3]
    assert all((rows[:, 0] == torch.arange(5)).all() and (rows[:, 1] != rows[:, 0]).all() for rows in mined)
    assert len({tuple(rows[:, 1].tolist()) for rows in mined[:12]}) > 1
    assert len({tuple(rows[:, 1].tolist()) for rows in mined[12:]}) == 1


def test_a_batch_of_one_image_has_no_negative_and_says_so():
    with pytest.raises(ValueError, match="no negative"):
        IAIS(uniter())(batch(torch.zeros(3, dtype=torch.int64)))


def test_only_the_first_row_of_an_image_is_a_candidate():
    assert first_of_each(ID).tolist() == [True, True, False, True, True]


def test_mining_is_without_dropout_and_gradient_and_restores_the_mode():
    model, given = uniter(dropout=0.5).train(), batch(torch.arange(5))
    once = hardest_of_pool(model, given.images[:1], given.captions, 3)
    assert once[0] == 0
    assert all(torch.equal(once, hardest_of_pool(model, given.images[:1], given.captions, 3)) for _ in range(3))
    assert model.training
    with mining_mode(model):
        assert not model.training
        assert not torch.is_grad_enabled()


def test_a_pool_keeps_the_highest_scored_negatives_beside_the_positive():
    model, given = uniter().eval(), batch(torch.arange(5))
    with torch.no_grad():
        scores = model.score(model.encode_images(given.images), model.encode_captions(given.captions[:1]))[:, 0]
    rows = hardest_of_pool(model, given.images, given.captions[:1], 2)
    assert set(rows.tolist()) == {0, *(scores[1:].argsort()[-2:] + 1).tolist()}
    with pytest.raises(ValueError, match="a pool is"):
        hardest_of_pool(model, given.images, given.captions, 2)


def test_positives_bounds_the_pairs_of_a_half_step():
    terms = IAIS(uniter(), ranking={"positives": 2, "hard_negatives": 1})(batch())
    assert all(torch.isfinite(t) for t in terms.values())


def test_one_positive_a_batch_is_the_authors_step_on_two_pools():
    method = IAIS(uniter(), ranking={"positives": 1, "hard_negatives": 2})
    given = batch(torch.arange(5))
    halves = pool_step(method, given.images[:1], given.captions) | pool_step(method, given.images, given.captions[:1])
    terms = method(given)
    assert terms.keys() == halves.keys()
    for name, value in halves.items():
        torch.testing.assert_close(terms[name], value)


def test_two_pools_are_the_authors_step_on_either_half_of_the_batch():
    method = IAIS(uniter(), ranking={"positives": 1, "hard_negatives": 2, "pools": "two"})
    given = batch(torch.arange(9))
    first, second = slice(0, 4), slice(4, 9)
    halves = pool_step(method, given.images[:1], given.captions[first])
    halves |= pool_step(method, given.images[second], given.captions[second][:1])
    terms = method(given)
    assert terms.keys() == halves.keys()
    for name, value in halves.items():
        torch.testing.assert_close(terms[name], value)
    whole = IAIS(method.matcher, ranking={"hard_negatives": 2, "pools": "two"})._mine(given, 0)
    assert {name: (rows[:, 0].tolist(), int(rows.min()), int(rows.max())) for name, (rows, _) in whole.items()} == {
        "V": ([0, 1, 2, 3], 0, 3),
        "L": ([4, 5, 6, 7, 8], 4, 8),
    }


def test_the_weight_grows_as_the_schedule_says():
    method = IAIS(uniter(), weight=8.0, steps=100)
    given = batch()
    first, last = method(given, 0), method(given, 100)
    assert last["iais_text"].item() / first["iais_text"].item() == pytest.approx(math.exp(5), rel=1e-4)
    assert method.alignment_weight(100) == 8.0
    assert [annealing(s, 50, 100) for s in ("linear", "log", "constant")] == [0.5, 1 - math.exp(-2.5), 1.0]


def test_weight_zero_is_the_base_without_alignment():
    assert set(IAIS(uniter(), weight=0.0)(batch())) == {"rank_image", "rank_text"}


@pytest.mark.parametrize(("anchors", "left_out"), [(["V"], "iais_text"), (["L"], "iais_image")])
def test_an_anchor_that_is_left_out_takes_its_term_away_and_nothing_else(anchors, left_out):
    model = uniter()
    both, one = IAIS(model)(batch()), IAIS(model, anchors=anchors)(batch())
    assert set(both) - set(one) == {left_out}
    assert all(one[name].item() == pytest.approx(both[name].item(), rel=1e-5) for name in one)
    late = SCAN(vocab_size=30, image={"kind": "regions", "in_width": 6}, text={"kind": "gru", "word_dim": 8, "width": 12})
    assert left_out not in IAIS(late, anchors=anchors)(batch())


@pytest.mark.parametrize("alignment", ["singular", "distributed", "soft"])
def test_every_trainable_parameter_gets_a_gradient(alignment):
    method = IAIS(uniter(), alignment=alignment)
    torch.stack(list(method(batch()).values())).sum().backward()
    assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_alignment_alone_lowers_the_distance_it_measures():
    method, given = IAIS(uniter(), alignment="distributed", schedule="constant", weight=1.0), batch(torch.arange(5))
    optimizer = torch.optim.Adam(method.parameters(), 3e-3)
    values = []
    for _ in range(25):
        terms = method(given)
        loss = terms["iais_image"] + terms["iais_text"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]


def test_late_interaction_takes_relations_from_cosines_of_its_parts():
    matcher = SCAN(vocab_size=30, image={"kind": "regions", "in_width": 6}, text={"kind": "gru", "word_dim": 8, "width": 12})
    terms = IAIS(matcher)(batch())
    assert set(terms) == {"triplet", "iais_image", "iais_text"}
    torch.stack(list(terms.values())).sum().backward()
    assert matcher.image.fc.weight.grad.abs().sum() > 0


def test_cosine_relations_are_softmaxes_over_words_and_regions_without_start_and_end():
    words, regions = torch.randn(1, 5, 3), torch.randn(1, 2, 3)
    got = cosine_relations(
        Encoded(parts=regions, mask=torch.ones(1, 2).bool()), Encoded(parts=words, mask=torch.tensor([[1, 1, 1, 1, 0]]).bool()), 4.0
    )
    want = (4 * nn.functional.cosine_similarity(words[0, 1:3, None], regions[0, None], dim=-1)).softmax(-1)
    torch.testing.assert_close(got.blocks[2][0, :2], want)
    assert got.blocks[2][0, 2:].abs().sum() == 0
    assert got.word_mask.tolist() == [[True, True, False]]


def test_a_dual_encoder_lends_the_parts_that_it_pools():
    given = batch()
    images = Images(ID, pixels=torch.randint(0, 255, (5, 3, 16, 16), dtype=torch.uint8))
    config = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {"kind": "hf_vision", "config": {**config, "image_size": 16, "patch_size": 4}}
    matcher = DualEncoder(vocab_size=30, image=vision, text={"kind": "pooled_gru", "word_dim": 8, "hidden": 8}, width=12)
    terms = IAIS(matcher)(Batch(images, given.captions))
    assert set(terms) == {"triplet", "iais_image", "iais_text"}
    assert len(matcher.image_encoder._forward_hooks) == 0


def test_what_has_no_words_and_regions_to_relate_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"image parts of this dual encoder are 128 wide.*takes 256"):
        IAIS(DualEncoder(vocab_size=30))
    tower = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    clip = CLIP(
        vocab_size=30,
        config={
            "model_type": "clip",
            "projection_dim": 8,
            "text_config": {**tower, "vocab_size": 30, "max_position_embeddings": 8},
            "vision_config": {**tower, "image_size": 16, "patch_size": 8},
        },
    )
    with pytest.raises(ValueError, match="CLIP offers one vector a side"):
        IAIS(clip)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alignment": "double"}, "known: singular, distributed, soft"),
        ({"schedule": "cosine"}, "known: exp"),
        ({"counterpart": "x"}, "known: softmax"),
        ({"anchors": []}, "a list of V, L or both"),
        ({"anchors": ["words"]}, "a list of V, L or both, not \\['words'\\]"),
        ({"anchor": ["V"]}, "no option 'anchor'; did you mean 'anchors'"),
        ({"ranking": {"margins": 1}}, "loss, margin, hard_negatives, positives, random_steps, pools"),
        ({"ranking": {"hard_negatives": 0}}, "hard_negatives"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        IAIS(uniter(), **options)


@pytest.mark.parametrize("anchor", ["V", "L"])
def test_a_half_step_is_the_one_written_plainly(anchor):
    torch.manual_seed(3)
    matcher = UNITER(vocab_size=30, hidden=16, layers=2, heads=2, dropout=0.0, region_dim=6, init_std=0.3).double()
    method = IAIS(matcher, weight=1.0, schedule="constant", ranking={"hard_negatives": 3}).train()
    counts, lengths = (torch.tensor([4, 2, 3, 5, 4]), torch.tensor([5, 3, 7, 4, 6]))
    counts, lengths = (counts[:1], lengths) if anchor == "V" else (counts, lengths[:1])
    seen, words = (torch.arange(int(n.max())) < n[:, None] for n in (counts, lengths))
    regions, boxes = torch.randn(*seen.shape, 6).double(), torch.rand(*seen.shape, 7).double()
    tokens = torch.randint(1, 30, words.shape) * words
    pool = {"regions": regions, "boxes": boxes, "region_mask": seen, "tokens": tokens, "word_mask": words}
    found = pool_step(
        method, Images(torch.arange(len(seen)), None, regions, boxes, seen), Captions(tokens, words, torch.arange(len(words)))
    )
    wanted = iais_half(matcher, {name: x.expand(5, *x.shape[1:]) for name, x in pool.items()}, anchor, keep=3)
    torch.testing.assert_close(tuple(found.values()), wanted)
