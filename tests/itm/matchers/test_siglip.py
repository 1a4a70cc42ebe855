"""The text side of SigLIP, which transformers' AutoModel does not know alone and which was trained on captions padded to one length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from itm.data.records import Caption
from itm.data.text import HFTokenizer, brief
from itm.matchers.encoders.towers import HFText, HFVision
from itm.teachers.text import HFTextTeacher
from itm.types import Captions, Images

WORDS = ["a", "red", "dog", "runs", "home", "and", "sleeps", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SigLIP with a word tokenizer that ends each caption with its pad token, as SigLIP's does."""
    path = tmp_path_factory.mktemp("siglip")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    text = {**tower, **ids, "vocab_size": 12, "max_position_embeddings": 16}
    SiglipModel(SiglipConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 16})).eval().save_pretrained(path)
    bare = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, **{word: n + 2 for n, word in enumerate(WORDS)}}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    known = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>", "model_max_length": 16}
    PreTrainedTokenizerFast(tokenizer_object=bare, model_input_names=["input_ids"], **known).save_pretrained(path)
    return path


TEXTS = ["a red dog", "a dog runs home and sleeps", "x"]


def reference(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled output and hidden states of the whole model on captions padded to 16 by hand."""
    rows = [[WORDS.index(word) + 2 for word in text.split()] for text in TEXTS]
    tokens = torch.tensor([row + [1] * (16 - len(row)) for row in rows])
    with torch.no_grad():
        out = SiglipModel.from_pretrained(folder).eval().text_model(input_ids=tokens)
    return out.pooler_output, out.last_hidden_state


def captions(folder: Path) -> Captions:
    tokens, mask = HFTokenizer(folder, clean=False)(TEXTS)
    return Captions(tokens, mask, torch.arange(len(TEXTS)))


def test_field_case_12_the_text_tower_of_siglip_encodes_as_the_whole_model_does(folder: Path) -> None:
    pooled, hidden = reference(folder)
    encoder = HFText(vocab_size=10, path=str(folder), pool="pooler").eval()
    again = HFText(vocab_size=10, **encoder.options).eval()
    again.load_state_dict(encoder.state_dict())
    rows = captions(folder)
    for made in (encoder, again):
        with torch.no_grad():
            found = made(rows)
        torch.testing.assert_close(found.vector, pooled)
        torch.testing.assert_close(found.parts, hidden[:, : rows.tokens.shape[1]])
    mean = HFText(vocab_size=10, path=str(folder)).eval()(rows)
    torch.testing.assert_close(mean.vector[2], hidden[2, :2].mean(0))
    assert not any(p.requires_grad for n, p in HFText(vocab_size=10, path=str(folder)).named_parameters() if ".head." in n)
    long = Captions(torch.full((1, 17), 2), torch.ones(1, 17, dtype=torch.bool), torch.arange(1))
    with pytest.raises(ValueError, match="reads 16 tokens, got 17: set text.max_length=16"):
        encoder(long)


def test_field_case_12_siglip_teaches_with_its_pooled_output(folder: Path) -> None:
    pooled, hidden = reference(folder)
    rows = [Caption(str(n), text) for n, text in enumerate(TEXTS)]
    teacher = HFTextTeacher(str(folder), clean=False)
    np.testing.assert_allclose(teacher(rows), torch.nn.functional.normalize(pooled, dim=1), atol=1e-5)
    assert teacher.identity["pooling"] == "pooler"
    first = HFTextTeacher(str(folder), pooling="cls", clean=False)(rows)
    np.testing.assert_allclose(first, torch.nn.functional.normalize(hidden[:, 0], dim=1), atol=1e-5)


def test_the_image_side_of_siglip_still_loads(folder: Path) -> None:
    images = Images(torch.arange(1), pixels=torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert HFVision(path=str(folder)).eval()(images).parts.shape == (1, 4, 32)


def test_field_case_12_a_message_of_another_library_is_cut_to_a_few_lines(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "' + "no_such_kind" * 400 + '"}')
    for look in (
        lambda: HFText(vocab_size=10, path=str(tmp_path)),
        lambda: HFText(vocab_size=10, config={"model_type": "siglip_text_model_of_nobody"}),
        lambda: HFTextTeacher(str(tmp_path)),
        lambda: HFTokenizer(tmp_path),
    ):
        with pytest.raises(ValueError, match=r"hold|make") as told:
            look()
        assert len(str(told.value)) < 700
    assert brief(ValueError("one\n two")) == "one two"


def test_field_case_13_a_tokenizer_without_pad_or_end_is_padded_with_zero_behind_the_mask(folder: Path, tmp_path: Path) -> None:
    bare = Tokenizer(models.WordLevel({"<unk>": 0, **{word: n + 1 for n, word in enumerate(WORDS)}}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>").save_pretrained(tmp_path)
    tokenizer = HFTokenizer(tmp_path, clean=False)
    tokens, mask = tokenizer(["a red dog", "x"])
    assert tokens.tolist() == [[1, 2, 3], [8, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    tokenizer.save(tmp_path / "saved")
    assert torch.equal(HFTokenizer(tmp_path / "saved", clean=False)(["a red dog", "x"])[0], tokens)


def test_field_case_13_a_teacher_takes_such_a_tokenizer_too(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    bare = Tokenizer(models.WordLevel({"<unk>": 0, **{word: n + 1 for n, word in enumerate(WORDS)}}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>", model_max_length=16).save_pretrained(tmp_path)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=10, max_position_embeddings=16, **size)).save_pretrained(tmp_path)
    teacher = HFTextTeacher(str(tmp_path), clean=False)
    rows = [Caption("0", "a red dog runs home"), Caption("1", "x")]
    np.testing.assert_allclose(teacher(rows)[1], teacher(rows[1:])[0], atol=1e-5)
