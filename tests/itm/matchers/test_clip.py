from __future__ import annotations

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from itm.matchers.clip import CLIP
from itm.types import Captions, Images

MEAN, STD = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])


def saved(folder):
    """A random two-layer CLIP on disk; its end token is 49."""
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 50, "max_position_embeddings": 12, "eos_token_id": 49, "bos_token_id": 48}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 16}, projection_dim=8)).eval()
    model.save_pretrained(folder)
    return model


def pairs():
    tokens = torch.randint(1, 48, (3, 7))
    mask = torch.arange(7) < torch.tensor([[7], [4], [5]])
    tokens[torch.arange(3), mask.sum(1) - 1] = 49
    tokens = tokens.masked_fill(~mask, 49)
    return Images(torch.arange(3), pixels=torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)), Captions(tokens, mask, torch.arange(3))


def test_without_heads_the_scores_are_those_of_hugging_faces_clip(tmp_path):
    theirs, (i, c) = saved(tmp_path), pairs()
    ours = CLIP(vocab_size=50, path=str(tmp_path)).eval()
    pixels = (i.pixels / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    with torch.no_grad():
        out = theirs(input_ids=c.tokens, attention_mask=c.mask.long(), pixel_values=pixels)
        scores = ours.score(ours.encode_images(i), ours.encode_captions(c))
    torch.testing.assert_close(scores, out.logits_per_image / theirs.logit_scale.exp(), atol=1e-5, rtol=1e-5)


def test_the_logit_scale_is_gone_and_the_heads_start_as_in_cusa(tmp_path):
    saved(tmp_path)
    model = CLIP(vocab_size=50, path=str(tmp_path), heads={"cross": True, "uni": True})
    assert not [name for name in model.state_dict() if "logit_scale" in name]
    weights = torch.cat(
        [head.linear.weight.flatten() for heads in (model.image_heads, model.text_heads) for head in (heads.cross, heads.uni)]
    )
    assert 0.015 < weights.std() < 0.025
    encoded = model.encode_captions(pairs()[1])
    assert (encoded.vector.shape, encoded.uni.shape) == ((3, 8), (3, 8))


def test_the_options_rebuild_it_without_the_path(tmp_path):
    saved(tmp_path)
    before = CLIP(vocab_size=50, path=str(tmp_path), heads={"uni": True}).eval()
    after = CLIP(vocab_size=50, **before.options).eval()
    after.load_state_dict(before.state_dict())
    i, c = pairs()
    torch.testing.assert_close(after.encode_images(i).uni, before.encode_images(i).uni)
    torch.testing.assert_close(after.encode_captions(c).vector, before.encode_captions(c).vector)


def test_wrong_sizes_and_a_wrong_tokenizer_are_named(tmp_path):
    saved(tmp_path)
    model = CLIP(vocab_size=50, path=str(tmp_path))
    i, c = pairs()
    with pytest.raises(ValueError, match=r"data\.image_size=32"):
        model.encode_images(Images(i.image_id, pixels=torch.zeros(3, 3, 64, 64, dtype=torch.uint8)))
    with pytest.raises(ValueError, match=r"text\.max_length=12"):
        model.encode_captions(Captions(c.tokens.repeat(1, 2), c.mask.repeat(1, 2), c.image_id))
    with pytest.raises(ValueError, match="60 ids"):
        CLIP(vocab_size=60, path=str(tmp_path))
    with pytest.raises(ValueError, match="holds no CLIP model"):
        CLIP(vocab_size=50, path=str(tmp_path / "nothing"))


def test_bare_uni_vectors_are_the_features_that_the_cross_head_hides(tmp_path):
    saved(tmp_path)
    images = pairs()[0]
    bare = CLIP(vocab_size=50, path=str(tmp_path)).eval()
    model = CLIP(vocab_size=50, path=str(tmp_path), heads={"cross": True, "uni": "bare"}).eval()
    assert {name.split(".")[1] for name in model.state_dict() if "heads" in name} == {"cross"}
    with torch.no_grad():
        torch.testing.assert_close(model.encode_images(images).uni, bare.encode_images(images).vector)
        assert not torch.allclose(model.encode_images(images).vector, bare.encode_images(images).vector)


@pytest.mark.parametrize("heads", [{"uni": "raw"}, {"cross": "bare"}, {"cross": 1.5}])
def test_a_choice_of_heads_that_there_is_not_is_refused_with_those_there_are(tmp_path, heads):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"heads takes cross \(true or false\) and uni \(true, false or bare\), not"):
        CLIP(vocab_size=50, path=str(tmp_path), heads=heads)
