from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

from itm.matchers.dual import DualEncoder, Head
from itm.matchers.encoders.towers import ConvTower, HFText, HFVision, PooledGRU
from itm.types import Captions, Images

VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32}
BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def images(rows=3, size=64):
    return Images(torch.arange(rows), pixels=torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8))


def captions(rows=3, length=6, vocab=20):
    mask = torch.arange(length) < torch.randint(2, length + 1, (rows, 1))
    mask[0] = True
    return Captions(torch.randint(4, vocab, (rows, length)) * mask, mask, torch.arange(rows))


def test_scores_are_cosines_and_do_not_depend_on_padding_or_company():
    model = DualEncoder(vocab_size=20, width=8).eval()
    i, c = images(), captions()
    scores = model.score(model.encode_images(i), model.encode_captions(c))
    padded = Captions(F.pad(c.tokens, (0, 3)), F.pad(c.mask, (0, 3)), c.image_id)
    alone = [model.score(model.encode_images(i[k : k + 1]), model.encode_captions(padded[k : k + 1])) for k in range(3)]
    assert scores.shape == (3, 3)
    assert scores.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(torch.cat(alone).flatten(), scores.diagonal(), atol=1e-5, rtol=1e-5)


def test_a_head_is_a_linear_layer_on_a_layer_norm():
    head, z = Head(6), torch.randn(4, 6)
    plain = (z - z.mean(1, keepdim=True)) / (z.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(head(z), plain @ head.linear.weight.T + head.linear.bias)


def test_heads_add_unit_vectors_and_are_part_of_the_weights():
    model = DualEncoder(vocab_size=20, width=8, heads={"cross": True, "uni": True})
    encoded = model.encode_images(images())
    torch.testing.assert_close(encoded.uni.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(encoded.vector.norm(dim=1), torch.ones(3))
    assert {"image_heads.cross.linear.weight", "text_heads.uni.norm.bias"} <= set(model.state_dict())
    assert DualEncoder(vocab_size=20, width=8).encode_images(images()).uni is None
    with pytest.raises(ValueError, match="cros"):
        DualEncoder(vocab_size=20, heads={"cros": True})


@pytest.mark.parametrize(
    ("image", "text"),
    [({"kind": "conv"}, {"kind": "pooled_gru"}), ({"kind": "hf_vision", "config": VIT}, {"kind": "hf_text", "config": BERT})],
)
def test_the_options_rebuild_the_same_architecture(image, text):
    before = DualEncoder(vocab_size=20, image=image, text=text, width=8).eval()
    after = DualEncoder(vocab_size=20, **before.options).eval()
    after.load_state_dict(before.state_dict())
    i, c = images(size=32 if "config" in image else 64), captions()
    torch.testing.assert_close(after.encode_images(i).vector, before.encode_images(i).vector)
    torch.testing.assert_close(after.encode_captions(c).vector, before.encode_captions(c).vector)


def test_the_conv_tower_offers_its_grid_and_names_a_wrong_size():
    tower = ConvTower(image_size=64)
    encoded = tower(images())
    assert (encoded.parts.shape, encoded.vector.shape) == ((3, 16, 128), (3, 256))
    with pytest.raises(ValueError, match=r"data\.image_size"):
        tower(images(size=32))
    with pytest.raises(ValueError, match=r"data\.image=pixels"):
        tower(Images(torch.arange(2), regions=torch.zeros(2, 3, 4)))


def test_the_pooled_gru_takes_the_maximum_over_real_words():
    tower, c = PooledGRU(vocab_size=20), captions()
    encoded = tower(c)
    for k, words in enumerate(c.mask.sum(1).tolist()):
        torch.testing.assert_close(
            encoded.vector[k], tower.gru(tower.embed(c.tokens[k : k + 1, :words]))[0][0].amax(0), atol=1e-6, rtol=1e-5
        )


def test_patch_tokens_leave_out_the_class_token_and_the_pixels_are_normalised(tmp_path):
    config = {k: v for k, v in VIT.items() if k != "model_type"}
    ViTModel(ViTConfig(**config, patch_size=16)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}')
    tower, i = HFVision(path=str(tmp_path)).eval(), images(size=32)
    hidden = ViTModel.from_pretrained(tmp_path)(pixel_values=(i.pixels / 255 - 0.5) / 0.25).last_hidden_state
    torch.testing.assert_close(tower(i).parts, hidden[:, 1:])
    assert tower(i).parts.shape == (3, 4, tower.width)
    with pytest.raises(ValueError, match="image_size=32"):
        tower(images(size=48))


def test_a_vision_tower_is_taken_out_of_clip_and_a_grid_is_flattened(tmp_path):
    CLIPVisionModel(
        CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    ).save_pretrained(tmp_path)
    assert HFVision(path=str(tmp_path))(images(size=32)).parts.shape == (3, 1, 16)
    resnet = {"model_type": "resnet", "embedding_size": 4, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    encoded = HFVision(config=resnet)(images(size=32))
    assert (encoded.parts.shape, encoded.vector.shape) == ((3, 16, 12), (3, 12))


def test_a_frozen_tower_stays_in_evaluation_mode_and_untrained(tmp_path):
    BertModel(BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"}, vocab_size=20)).save_pretrained(tmp_path)
    tower = HFText(vocab_size=20, path=str(tmp_path), freeze=True).train()
    assert not tower.model.training
    assert not any(p.requires_grad for p in tower.parameters())
    assert HFText(vocab_size=20, **tower.options).options == tower.options


def test_a_foreign_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"30 ids.*embeds 20.*text\.path"):
        HFText(vocab_size=30, config={**BERT, "vocab_size": 20})
    with pytest.raises(ValueError, match="either path"):
        HFVision()
    with pytest.raises(ValueError, match="model_type"):
        HFVision(config={"hidden_size": 8})
    with pytest.raises(ValueError, match="holds no model"):
        HFVision(path=str(tmp_path))
