"""VisualBERT: its states and relations are those of Hugging Face's model, and its weights load and come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import VisualBertConfig, VisualBertModel

from itm.kinds import build_part
from itm.matchers import MATCHERS
from itm.matchers.joint.visual_bert import VisualBERT
from itm.methods import METHODS
from itm.types import Captions, Images
from tests.support.every_matcher import POSITIONS, WORDS, batch_of

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 12}


@pytest.fixture
def theirs(tmp_path: Path) -> tuple[VisualBertModel, str]:
    torch.manual_seed(0)
    model = VisualBertModel(VisualBertConfig(vocab_size=40, visual_embedding_dim=6, attn_implementation="eager", **SIZES)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(tmp_path)
    return model, str(tmp_path)


def pair() -> tuple[Images, Captions]:
    """Two images of 3 and 2 regions without boxes, two captions of 5 and 4 tokens."""
    mask, words = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(), torch.tensor([[1] * 5, [1] * 4 + [0]]).bool()
    regions = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(3, 40, (2, 5), generator=torch.Generator().manual_seed(2)) * words
    return Images(torch.arange(2), regions=regions, mask=mask), Captions(tokens, words, torch.arange(2))


def test_the_pooled_states_are_those_of_hugging_faces_model(theirs: tuple[VisualBertModel, str]) -> None:
    model, path = theirs
    images, captions = pair()
    ours = VisualBERT(vocab_size=40, path=path).eval()
    with torch.no_grad():
        want = model(
            input_ids=captions.tokens,
            attention_mask=captions.mask.long(),
            visual_embeds=images.regions,
            visual_attention_mask=images.mask.long(),
        ).pooler_output
        scores = ours.score(ours.encode_images(images), ours.encode_captions(captions)).diagonal()
        torch.testing.assert_close(scores, ours.rank_output(want)[:, 0], atol=1e-5, rtol=1e-5)


def test_the_relations_are_the_attentions_of_its_last_layer_softmaxed_block_by_block(theirs: tuple[VisualBertModel, str]) -> None:
    """Within a block the softmax of the products is the row of the joint attention divided by its sum over the block."""
    model, path = theirs
    images, captions = pair()
    ours = VisualBERT(vocab_size=40, path=path).eval()
    with torch.no_grad():
        given = {"visual_embeds": images.regions, "visual_attention_mask": images.mask.long(), "output_attentions": True}
        attention = model(input_ids=captions.tokens, attention_mask=captions.mask.long(), **given).attentions[-1]
        found = ours.pairs(ours.encode_images(images), ours.encode_captions(captions), torch.arange(2)).relations
    assert found is not None
    words = slice(1, 4), slice(5, 8)  # start and end of the caption left out; regions
    for row, (n, m) in enumerate(((3, 3), (2, 2))):
        for block, (x, y), (rows, columns) in zip(
            found.blocks, ((0, 0), (1, 1), (0, 1), (1, 0)), ((n, n), (m, m), (n, m), (m, n)), strict=True
        ):
            part = attention[row][:, words[x], words[y]][:, :rows, :columns]
            want = (part / part.sum(-1, keepdim=True)).mean(0)
            torch.testing.assert_close(block[row, :rows, :columns], want, atol=1e-5, rtol=1e-5)


def test_iais_gives_every_trainable_weight_a_gradient() -> None:
    torch.manual_seed(3)
    matcher = VisualBERT(vocab_size=WORDS, hidden=16, layers=2, heads=2, positions=POSITIONS, region_dim=6, init_std=0.25)
    method = build_part(METHODS, "iais", {"schedule": "constant", "ranking": {"hard_negatives": 2}}, "method", matcher=matcher)
    losses = method(batch_of(4))
    assert set(losses) == {"rank_image", "rank_text", "iais_image", "iais_text"}
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, weight in method.named_parameters() if weight.requires_grad and weight.grad is None] == []


def test_the_options_rebuild_it_without_the_path(theirs: tuple[VisualBertModel, str]) -> None:
    before = VisualBERT(vocab_size=40, path=theirs[1])
    after = build_part(MATCHERS, "visual_bert", before.options, "model", vocab_size=40)
    after.load_state_dict(before.state_dict())
    assert (after.region_dim, after.positions, len(after.layers())) == (6, 12, 2)


def test_what_it_cannot_read_is_named(theirs: tuple[VisualBertModel, str]) -> None:
    images, _ = pair()
    with pytest.raises(ValueError, match="this VisualBERT knows 40 words, the tokenizer 41: set text.path to its own tokenizer"):
        VisualBERT(vocab_size=41, path=theirs[1])
    with pytest.raises(ValueError, match=r"regions are 6 wide, this VisualBERT takes 2048: set model\.options\.region_dim"):
        VisualBERT(vocab_size=40, hidden=16, heads=2, layers=1).encode_images(images)
    with pytest.raises(ValueError, match=r"VisualBERT takes regions: set data\.image=regions"):
        VisualBERT(vocab_size=40, hidden=16, heads=2, layers=1).encode_images(Images(torch.arange(2)))
