"""Models of many families, tiny and random and saved to disk, give the layer and the pooling that were asked for."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from itm.data.records import Caption
from itm.data.shards import Sample
from itm.teachers.image import HFVisionTeacher
from itm.teachers.text import HFTextTeacher

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
PIXELS = {"image_size": 32, "patch_size": 16}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "square", "left", "of"]
TEXT = {**SIZES, "vocab_size": len(WORDS), "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def photo(seed: int = 0) -> Sample:
    """32 x 32 noise, so that no resizing stands between it and the model."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(out, "PNG")
    return Sample("k", out.getvalue(), None, [Caption("0", "a photo")], {})


def pixels(seed: int = 0) -> torch.Tensor:
    raw = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return torch.tensor((raw.astype(np.float32) / 255 - 0.5) / 0.25).permute(2, 0, 1)[None]


def saved(model: torch.nn.Module, folder) -> str:
    """A folder of the model, whose image processor changes no size."""
    torch.manual_seed(0)
    for parameter in model.parameters():  # some families start with zeros
        parameter.data.normal_(0, 0.2)
    model.eval().save_pretrained(folder)
    processor = {"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


def with_words(folder) -> str:
    from transformers import BertTokenizerFast

    (folder / "words.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "words.txt"), model_input_names=["input_ids", "attention_mask"]).save_pretrained(folder)
    return str(folder)


def ids(words: str) -> torch.Tensor:
    return torch.tensor([[2, *(WORDS.index(word) for word in words.split()), 3]])


def dinov2():
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**{name: SIZES[name] for name in SIZES if name != "intermediate_size"}, **PIXELS, mlp_ratio=2))


def registers():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    sizes = {name: SIZES[name] for name in SIZES if name != "intermediate_size"}
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, **PIXELS, mlp_ratio=2, num_register_tokens=3))


def convnext():
    from transformers import ConvNextConfig, ConvNextModel

    return ConvNextModel(ConvNextConfig(hidden_sizes=[4, 8, 8, 16], depths=[1, 1, 1, 1], image_size=32))


def swin():
    from transformers import SwinConfig, SwinModel

    return SwinModel(SwinConfig(image_size=32, patch_size=4, window_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2]))


def siglip(vision: bool = True):
    from transformers import SiglipTextConfig, SiglipTextModel, SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**SIZES, **PIXELS)) if vision else SiglipTextModel(SiglipTextConfig(**TEXT))


def clip():
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config={**SIZES, **PIXELS}, projection_dim=8))


IMAGES = [
    (dinov2, {"pooling": "cls"}, lambda m, x: m(x).last_hidden_state[:, 0]),
    (dinov2, {"pooling": "mean", "layer": -2}, lambda m, x: m(x, output_hidden_states=True).hidden_states[-2][:, 1:].mean(1)),
    (registers, {"pooling": "patches"}, lambda m, x: m(x).last_hidden_state[:, 4:].flatten(1)),
    (convnext, {"pooling": "mean"}, lambda m, x: m(x).last_hidden_state.mean((2, 3))),
    (convnext, {"pooling": "mean", "layer": 2}, lambda m, x: m(x, output_hidden_states=True).hidden_states[2].mean((2, 3))),
    (swin, {"pooling": "mean"}, lambda m, x: m(x).last_hidden_state.mean(1)),
    (siglip, {"pooling": "pooler"}, lambda m, x: m(x).pooler_output),
    (clip, {"pooling": "cls", "layer": 1}, lambda m, x: m.vision_model(x, output_hidden_states=True).hidden_states[1][:, 0]),
    (clip, {"pooling": "joint"}, lambda m, x: m.visual_projection(m.vision_model(x).pooler_output)),
]


@pytest.mark.parametrize(("make", "options", "pick"), IMAGES)
def test_an_image_model_of_any_family_gives_what_its_own_forward_gives(make, options, pick, tmp_path):
    model = make()
    teacher = HFVisionTeacher(saved(model, tmp_path), **options)
    with torch.no_grad():
        expected = pick(model, pixels(1)).numpy()
    assert teacher.width == expected.shape[1]
    np.testing.assert_allclose(teacher([photo(0), photo(1)])[1:], expected, atol=2e-5)


def bert():
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**TEXT))


def t5():
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


def gpt2():
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(vocab_size=len(WORDS), n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=3))


TEXTS = [
    (bert, {"pooling": "mean", "layer": 1}, lambda m, x: m(x, output_hidden_states=True).hidden_states[1].mean(1)),
    (bert, {"pooling": "cls", "layer": -2}, lambda m, x: m(x, output_hidden_states=True).hidden_states[-2][:, 0]),
    (bert, {"pooling": "pooler"}, lambda m, x: m(x).pooler_output),
    (t5, {}, lambda m, x: m(x).last_hidden_state.mean(1)),
    (gpt2, {"pooling": "last"}, lambda m, x: m(x).last_hidden_state[:, -1]),
    (clip, {"pooling": "joint"}, lambda m, x: m.text_projection(m.text_model(x).pooler_output)),
    (clip, {"pooling": "mean"}, lambda m, x: m.text_model(x).last_hidden_state.mean(1)),
]


@pytest.mark.parametrize(("make", "options", "pick"), TEXTS)
def test_a_text_model_of_any_family_gives_what_its_own_forward_gives(make, options, pick, tmp_path):
    model = make()
    saved(model, tmp_path)
    teacher = HFTextTeacher(with_words(tmp_path), **options)
    words = "a red square", "left of a red square"  # of two lengths, so that one is padded
    with torch.no_grad():
        expected = torch.nn.functional.normalize(pick(model, ids(words[0]))).numpy()
    found = teacher([Caption(str(n), text) for n, text in enumerate(words)])
    np.testing.assert_allclose(found[:1], expected, atol=2e-5)
    assert teacher.identity["layer"] == options.get("layer", -1)


def test_a_sentence_transformers_folder_may_pool_by_the_last_token(tmp_path):
    saved(gpt2(), tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true, "pooling_mode_mean_tokens": false}')
    assert HFTextTeacher(with_words(tmp_path)).pooling == "last"


def test_layers_and_poolings_that_a_model_does_not_have_are_named(tmp_path):
    for name, model in (("bert", bert()), ("dino", dinov2())):
        (tmp_path / name).mkdir()
        saved(model, tmp_path / name)
    words, images = with_words(tmp_path / "bert"), str(tmp_path / "dino")
    for refused, said in (
        (lambda: HFTextTeacher(words, layer=4), r"layer 4: the model has the hidden states 0 to 2"),
        (lambda: HFVisionTeacher(images, layer=-5), r"layer -5: the model has the hidden states 0 to 2"),
        (lambda: HFTextTeacher(words, "pooler", layer=1), r"'pooler' is of the final output; leave layer at -1"),
        (lambda: HFVisionTeacher(images, "joint"), r"no pair of an image and a text model"),
        (lambda: HFTextTeacher(words, "joint"), r"no pair of an image and a text model"),
        (lambda: HFTextTeacher(words, "max"), r"pooling 'max'; known: auto, mean, cls, last, pooler, joint"),
    ):
        with pytest.raises(ValueError, match=said):
            refused()
