"""UNITER: scores do not depend on padding, chunks, order or layout; relation blocks; bad input."""

from __future__ import annotations

import pytest
import torch

from itm.matchers.joint.pairs import compact, inner_words
from itm.matchers.joint.uniter import UNITER, patch_boxes
from itm.types import Captions, Encoded, Images

SMALL = {"vocab_size": 50, "hidden": 16, "layers": 2, "heads": 2, "intermediate": 24, "positions": 12, "dropout": 0.0, "region_dim": 6}


def matcher(**options) -> UNITER:
    torch.manual_seed(1)
    model = UNITER(**{**SMALL, **options}).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)  # away from the almost constant scores of a fresh model
    return model


def rows(counts=(4, 2, 3), lengths=(5, 3, 7, 4), pad=0) -> tuple[Images, Captions]:
    generator = torch.Generator().manual_seed(7)
    regions = torch.randn(len(counts), max(counts), 6, generator=generator)
    boxes = torch.rand(len(counts), max(counts), 7, generator=generator)
    tokens = torch.randint(1, 50, (len(lengths), max(lengths)), generator=generator)
    mask, words = (torch.arange(max(n)) < torch.tensor(n)[:, None] for n in (counts, lengths))
    widen = torch.nn.functional.pad
    images = Images(torch.arange(len(counts)), None, widen(regions, (0, 0, 0, pad)), widen(boxes, (0, 0, 0, pad)), widen(mask, (0, pad)))
    return images, Captions(widen(tokens * words, (0, pad)), widen(words, (0, pad)), torch.zeros(len(lengths), dtype=torch.int64))


def scores(model: UNITER, images: Images, captions: Captions) -> torch.Tensor:
    with torch.no_grad():
        return model.score(model.encode_images(images), model.encode_captions(captions))


def test_padding_of_either_side_changes_no_score():
    model = matcher()
    torch.testing.assert_close(scores(model, *rows()), scores(model, *rows(pad=3)), atol=1e-6, rtol=0)
    images, captions = rows(pad=4)
    wide = Encoded(
        torch.zeros(3, 1),
        torch.cat([model.encode_images(images).parts, torch.randn(3, 5, 16)], 1),
        torch.cat([images.mask[:, :4], torch.zeros(3, 5).bool()], 1),
    )
    with torch.no_grad():
        got = model.score(wide, model.encode_captions(captions))
    torch.testing.assert_close(got, scores(model, *rows()), atol=1e-6, rtol=0)


def test_relations_of_a_layer_are_those_of_a_model_that_ends_with_it_and_the_scores_stay():
    images, captions = rows(lengths=(5, 3, 7))
    whole, asked = matcher(layers=3), torch.arange(3)
    encoded = whole.encode_images(images), whole.encode_captions(captions)
    want = whole.pairs(*encoded, asked)
    for number in (1, 2, 3):
        tapped, short = matcher(layers=3, relation_layer=number), matcher(layers=number)
        tapped.load_state_dict(whole.state_dict())
        short.load_state_dict({name: value for name, value in whole.state_dict().items() if name in short.state_dict()})
        found = tapped.pairs(*encoded, asked)
        torch.testing.assert_close(found.scores, want.scores, atol=0, rtol=0)
        for ours, theirs in zip(found.relations.blocks, short.pairs(*encoded, asked).relations.blocks, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="relation_layer=4 is none of the layers 1 to 3"):
        matcher(layers=3, relation_layer=4)


def test_a_pair_alone_scores_as_in_the_matrix():
    model, (images, captions) = matcher(), rows()
    matrix = scores(model, images, captions)
    for i in range(len(images)):
        for t in range(len(captions)):
            alone = scores(model, images[i : i + 1], captions[t : t + 1])
            torch.testing.assert_close(alone[0, 0], matrix[i, t], atol=1e-6, rtol=0)


@pytest.mark.parametrize("tokens", [1, 25, 10_000])
def test_the_chunk_size_changes_no_score(tokens):
    torch.testing.assert_close(scores(matcher(score_tokens=tokens), *rows()), scores(matcher(), *rows()), atol=1e-6, rtol=0)


def test_pairs_of_a_chunk_are_of_like_length():
    seen: list[tuple[int, int]] = []
    model, (images, captions) = matcher(score_tokens=22), rows()
    model.uniter.encoder.layer[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[:2]))
    scores(model, images, captions)
    lengths = sorted(n + m for n in (4, 2, 3) for m in (5, 3, 7, 4))
    assert seen == [(2, length) for length in lengths[1::2]]


def test_permuted_rows_give_permuted_scores():
    model, (images, captions) = matcher(), rows()
    order, other = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(
        scores(model, images[order], captions[other]), scores(model, images, captions)[order][:, other], atol=1e-6, rtol=0
    )


def test_pairs_agree_with_the_matrix_in_both_layouts():
    model, (images, captions) = matcher(), rows()
    which = torch.tensor([0, 2, 1, 1]), torch.tensor([3, 0, 1, 2])
    left, right = model.encode_images(images)[which[0]], model.encode_captions(captions)[which[1]]
    with torch.no_grad():
        want = model.score(model.encode_images(images), model.encode_captions(captions))[which]
        torch.testing.assert_close(model.pairs(left, right).scores, want, atol=1e-6, rtol=0)
        torch.testing.assert_close(model.pairs(left, right, torch.tensor([0])).scores, want, atol=1e-6, rtol=0)


def test_blocks_are_the_renormalised_slices_of_the_joint_attention():
    model, (images, captions) = matcher().double(), rows(lengths=(5, 3, 7))
    left, right = model.encode_images(images), model.encode_captions(captions)
    relations = model.pairs(left, right, torch.arange(3)).relations
    assert relations is not None
    joint, mask = torch.cat([right.parts, left.parts], 1), torch.cat([right.mask, left.mask], 1)
    hidden, attention = model.uniter.encoder.layer[0](joint, mask)[0], model.uniter.encoder.layer[1].attention.self
    for g, (n, m) in enumerate(((3, 4), (1, 2), (5, 3))):
        query, key = (f(hidden[g]).view(-1, 2, 8).transpose(0, 1) for f in (attention.query, attention.key))
        full = (query @ key.mT / 8**0.5).masked_fill(~mask[g], -torch.inf).softmax(-1)
        words, regions = slice(1, 1 + n), slice(7, 7 + m)
        for block, r, c in zip(relations.blocks, (words, regions, words, regions), (words, regions, regions, words), strict=True):
            part = full[:, r, c]
            want = (part / part.sum(-1, keepdim=True)).mean(0)
            torch.testing.assert_close(block[g, : want.shape[0], : want.shape[1]], want, atol=1e-12, rtol=1e-9)
            assert block[g, want.shape[0] :].abs().sum() == 0
            assert block[g, :, want.shape[1] :].abs().sum() == 0


def test_blocks_are_free_of_dropout():
    """One layer, so that no earlier dropout reaches it: in train mode the blocks are those of eval mode."""
    model, (images, captions) = matcher(layers=1, dropout=0.5), rows(lengths=(5, 3, 7))
    left, right = model.encode_images(images), model.encode_captions(captions)
    want = model.pairs(left, right, torch.arange(3)).relations
    got = model.train().pairs(left, right, torch.arange(3)).relations
    for a, b in zip(want.blocks, got.blocks, strict=True):
        torch.testing.assert_close(a, b)


def test_a_caption_without_words_scores_and_has_an_empty_relation():
    model, (images, captions) = matcher(), rows(counts=(4, 2), lengths=(2, 2))
    pairs = model.pairs(model.encode_images(images), model.encode_captions(captions), torch.arange(2))
    assert torch.isfinite(pairs.scores).all()
    assert pairs.relations.blocks[0].shape == (2, 0, 0)
    mixed = rows(counts=(4, 2), lengths=(2, 5))
    relations = model.pairs(model.encode_images(mixed[0]), model.encode_captions(mixed[1]), torch.arange(2)).relations
    assert all(torch.isfinite(b).all() for b in relations.blocks)


def test_recomputed_chunks_give_the_same_gradient():
    gradients = []
    for recompute in (False, True):
        model = matcher(recompute=recompute, score_tokens=30)
        images, captions = rows()
        model.score(model.encode_images(images), model.encode_captions(captions)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


def test_every_trainable_parameter_gets_a_gradient_from_the_scores():
    model = matcher()
    images, captions = rows()
    model.score(model.encode_images(images), model.encode_captions(captions)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_patch_tokens_stand_in_for_regions():
    model = matcher(image={"kind": "conv", "image_size": 16})
    images = Images(torch.arange(2), pixels=torch.randint(0, 255, (2, 3, 16, 16), dtype=torch.uint8))
    got = scores(model, images, rows()[1])
    assert got.shape == (2, 4)
    again = UNITER(vocab_size=50, **model.options).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(scores(again, images, rows()[1]), got)


def test_patch_boxes_tile_the_image_and_a_summary_token_covers_it():
    boxes = patch_boxes(5)
    assert boxes[0].tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert boxes[4].tolist() == [0.5, 0.5, 1, 1, 0.5, 0.5, 0.25]
    with pytest.raises(ValueError, match="square grid"):
        patch_boxes(6)


def test_inner_words_leave_start_and_end_out():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    assert inner_words(mask).tolist() == [[False, True, True, False], [False] * 4, [False] * 4]


def test_compacting_keeps_order_and_cuts_to_the_longest():
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    joint, prefix = compact(torch.arange(10.0).view(2, 5, 1), mask)
    assert joint[0, :, 0].tolist() == [0, 2, 3]
    assert prefix.tolist() == [[True, True, True], [True, True, False]]


def test_bfloat16_autocast_scores_and_relates():
    model, (images, captions) = matcher(), rows(lengths=(5, 3, 7))
    with torch.autocast("cpu", torch.bfloat16):
        pairs = model.pairs(model.encode_images(images), model.encode_captions(captions), torch.arange(3))
    assert pairs.relations.blocks[0].dtype == torch.float32
    want = scores(model, images, captions).diagonal()
    torch.testing.assert_close(pairs.scores.float(), want, atol=0.1, rtol=0.1)


def test_more_tokens_than_positions_names_the_option():
    with pytest.raises(ValueError, match=r"13 tokens.*12 positions.*text.max_length"):
        matcher().encode_captions(rows(lengths=(13, 4))[1])


def test_a_caption_of_no_token_at_all_is_refused():
    captions = rows(lengths=(3, 4))[1]
    captions.mask[0] = False
    with pytest.raises(ValueError, match="0 tokens"):
        matcher().encode_captions(captions)


def test_a_token_outside_the_vocabulary_is_refused():
    captions = rows()[1]
    captions.tokens[0, 0] = 50
    with pytest.raises(ValueError, match="token id 50"):
        matcher().encode_captions(captions)


def test_wrong_region_width_missing_boxes_and_pixels_are_refused():
    images = rows()[0]
    with pytest.raises(ValueError, match=r"6 wide.*takes 8"):
        matcher(region_dim=8).encode_images(images)
    with pytest.raises(ValueError, match="regions with boxes"):
        matcher().encode_images(Images(images.image_id, regions=images.regions))
    with pytest.raises(ValueError, match="7 numbers"):
        matcher().encode_images(Images(images.image_id, None, images.regions, images.boxes[..., :4], images.mask))


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple of heads"):
        matcher(heads=3)
    with pytest.raises(ValueError, match="own input"):
        matcher(image={"kind": "regions"})
