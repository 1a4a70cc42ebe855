from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from itm.matchers.dual import DualEncoder, Head
from itm.types import Captions
from tests.support.tower_inputs import BERT, VIT, captions, images


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
