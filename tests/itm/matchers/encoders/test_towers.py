"""Encoders from pixels and token ids, each against the same work done by hand or by Hugging Face's own class."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

from itm.matchers.encoders.towers import ConvTower, HFText, HFVision, Normalise, PooledGRU, check_tokens, pool_tokens
from itm.types import Captions, Images
from tests.support.tower_inputs import BERT, VIT, captions, images


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


def test_pixels_become_numbers_of_the_given_mean_and_deviation():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    found = Normalise((0.5, 0.1, 0.0), (0.5, 0.2, 4.0))(Images(torch.arange(1), pixels=pixels))
    torch.testing.assert_close(found.flatten(), torch.tensor([-1.0, 0.5, 0.25]))


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_tokens_are_pooled_over_the_real_ones_only(pool: str):
    parts, lengths = torch.randn(3, 5, 4), [5, 2, 1]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    wanted = {"mean": lambda row, n: row[:n].mean(0), "first": lambda row, n: row[0], "last": lambda row, n: row[n - 1]}[pool]
    torch.testing.assert_close(pool_tokens(parts, mask, pool), torch.stack([wanted(r, n) for r, n in zip(parts, lengths, strict=True)]))


def test_a_text_model_reads_real_tokens_only():
    tower, c = HFText(vocab_size=20, config=BERT).eval(), captions(4)
    encoded = tower(c)
    for row, words in enumerate(c.mask.sum(1).tolist()):
        alone = tower.model(input_ids=c.tokens[row : row + 1, :words]).last_hidden_state[0]
        torch.testing.assert_close(encoded.parts[row, :words], alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(encoded.vector[row], alone.mean(0), atol=1e-5, rtol=1e-4)


def test_rows_without_a_token_and_ids_beyond_the_embeddings_are_named():
    c = captions(3)
    check_tokens(c, 20)
    with pytest.raises(ValueError, match=r"caption rows \[1\] of the batch have no word"):
        check_tokens(Captions(c.tokens, c.mask & torch.tensor([[True], [False], [True]]), c.image_id), 20)
    with pytest.raises(ValueError, match=f"token id {int(c.tokens.max())} in a vocabulary of 4"):
        check_tokens(c, 4)


TIMM = {"model_type": "timm_wrapper", "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.4, 0.4, 0.4]}}


def timm_imports() -> bool:
    """Also where it is installed it may not: it needs a torchvision that fits the installed torch."""
    try:
        import timm  # noqa: F401
    except Exception:  # torchvision raises RuntimeError
        return False
    return True


@pytest.mark.skipif(timm_imports(), reason="timm imports here")
def test_a_model_of_timm_is_refused_by_name_where_timm_does_not_import(tmp_path):
    config = {**TIMM, "architecture": "resnet10t"}
    with pytest.raises(ValueError, match=r"image encoder hf_vision: config=.*makes no model.*timm"):
        HFVision(config=config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"image encoder hf_vision: path=.*holds no model.*[Tt]imm"):
        HFVision(path=str(tmp_path))


@pytest.mark.skipif(not timm_imports(), reason="timm does not import here")
@pytest.mark.parametrize(
    ("architecture", "width", "parts"),
    [("resnet10t", 512, 49), ("vit_tiny_patch16_224", 192, 196), ("swin_tiny_patch4_window7_224", 768, 49)],
)
def test_a_model_of_timm_gives_its_patches_without_class_tokens(architecture, width, parts):
    encoder = HFVision(config={**TIMM, "architecture": architecture}).eval()
    photo = Images(torch.arange(1), pixels=torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8))
    with torch.inference_mode():
        found = encoder(photo)
        own = encoder.model.timm_model.forward_features((photo.pixels / 255 - 0.5) / 0.4)
    assert (encoder.width, found.parts.shape) == (width, (1, parts, width))
    rows = own if own.shape[-1] == width else own.permute(0, 2, 3, 1)
    assert torch.allclose(found.parts, rows.reshape(1, -1, width)[:, -parts:], atol=1e-4)
