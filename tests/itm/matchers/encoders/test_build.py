"""Encoders by kind, and what of a matcher counts as tower or layer."""

from __future__ import annotations

import pytest
import torch

from itm.matchers.encoders.build import build_image_encoder, build_text_encoder, layers_of
from itm.matchers.encoders.gru import WordGRU
from itm.matchers.encoders.towers import ConvTower
from itm.matchers.late.scan import SCAN
from tests.support.late_worlds import SMALL

BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}


def test_a_kind_builds_its_class_with_its_options():
    image, text = build_image_encoder("conv", image_size=32), build_text_encoder("gru", vocab_size=20, width=6)
    assert isinstance(image, ConvTower) and image.options["image_size"] == 32
    assert isinstance(text, WordGRU) and (text.width, text.embed.num_embeddings) == (6, 20)


def test_an_unknown_kind_or_option_is_named_with_the_near_one():
    with pytest.raises(ValueError, match="unknown image encoder 'con'; did you mean 'conv'"):
        build_image_encoder("con")
    with pytest.raises(ValueError, match="text encoder 'gru' has no option 'widht'; did you mean 'width'"):
        build_text_encoder("gru", vocab_size=20, widht=3)


def test_the_layers_of_a_late_matcher_are_its_two_encoders():
    matcher = SCAN(**SMALL)
    assert set(matcher.layers()) == {matcher.image, matcher.text}


def test_the_layers_of_a_hugging_face_tower_are_its_blocks_and_of_another_none():
    text = build_text_encoder("hf_text", vocab_size=20, config=BERT)
    assert layers_of(text) == list(text.model.encoder.layer)
    assert len(layers_of(text)) == 3
    assert layers_of(build_text_encoder("gru", vocab_size=20)) == []
    assert layers_of(torch.nn.Linear(2, 2)) == []
