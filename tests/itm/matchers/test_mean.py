"""The mean of matchers is one matcher, whose scores are those of its members added up and divided."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import itm
from itm.config import Part
from itm.data.formats import NewerFormat
from itm.data.preprocess import ImageInput, Inputs
from itm.data.text import SPECIAL, WordVocabulary
from itm.evaluation.scoring import encode_rows, score_matrix
from itm.matchers.folder import build_matcher, save_matcher
from itm.matchers.mean import Mean, MeanInputs
from itm.matchers.uni_heads import UniHeads, give_heads
from itm.matchers.weights import weights_hash
from itm.types import Encoded, Matcher
from tests.support.every_matcher import KINDS, WORDS, captions_of, images_of
from tests.support.noise_split import png

TEXTS = ["a dog", "two dogs run", "a cat"]


def words(*first: str, length: int = 12) -> WordVocabulary:
    named = [*SPECIAL, *(first or ("a", "dog", "cat", "two")), *(f"word{n}" for n in range(WORDS - 8))]
    return WordVocabulary({word: n for n, word in enumerate(named)}, max_length=length)


def made(name: str, seed: int = 0, sees: ImageInput | None = None, tokenizer: WordVocabulary | None = None, **options: Any) -> Matcher:
    torch.manual_seed(seed)
    kind, given = KINDS[name]
    sees = sees or ImageInput("regions", max_regions=4, region_width=6)
    return build_matcher(Part(kind=kind, options={**given, **options}), Inputs(sees, tokenizer or words())).eval()


def pixels(size: int, seed: int) -> Matcher:
    return made("dual", seed, ImageInput(size=size, crop="squash"), image={"kind": "conv", "image_size": size, "hidden": 8})


def cosines(left: Tensor, right: Tensor) -> Tensor:
    return F.normalize(left, dim=1) @ F.normalize(right, dim=1).T


def test_its_folder_needs_nothing_outside_and_gives_the_mean_of_the_members_score_matrices(tmp_path: Path) -> None:
    members = [made("sgr", 1), made("saf", 2)]
    images, captions = images_of(5), captions_of([3, 6, 4, 9])
    wanted = (score_matrix(members[0], images, captions) + score_matrix(members[1], images, captions)) / 2
    save_matcher(Mean.of(members), tmp_path / "made" / "mean")
    shutil.move(tmp_path / "made" / "mean", tmp_path / "mean")
    again = itm.load_matcher(tmp_path / "mean")
    assert torch.equal(score_matrix(again, images, captions), wanted)
    encoded = encode_rows(again, images, 2), encode_rows(again, captions, 3)
    torch.testing.assert_close(score_matrix(again, *encoded), wanted)
    assert torch.equal(score_matrix([again], [encoded[0]], [encoded[1]]), score_matrix(again, *encoded))
    with torch.no_grad():
        torch.testing.assert_close(again.score(*encoded), wanted)
    assert weights_hash(again) == "+".join(map(weights_hash, members))
    said = json.loads((tmp_path / "mean" / "config.json").read_text())
    assert (said["format"], said["kind"], [own["kind"] for own in said["options"]["members"]]) == (2, "mean", ["sgr", "saf"])
    assert sorted(path.name for path in (tmp_path / "mean").iterdir()) == ["config.json", "inputs.json", "model.safetensors", "tokenizer"]


def test_the_cosine_of_its_vectors_is_the_mean_of_the_members_cosines_through_their_heads_where_they_have_some(tmp_path: Path) -> None:
    members = [made("scan", 1), made("saf", 2)]
    torch.manual_seed(4)
    give_heads(members[1], UniHeads("linear", 10))
    save_matcher(Mean.of(members), tmp_path / "mean")
    again = itm.load_matcher(tmp_path / "mean")
    images, captions = images_of(5), captions_of([3, 6, 4])
    with torch.no_grad():
        each = [(member.encode_images(images), member.encode_captions(captions)) for member in members]
        own = again.encode_images(images), again.encode_captions(captions)
    torch.testing.assert_close(own[0].vector @ own[1].vector.T, sum(cosines(i.vector, c.vector) for i, c in each) / 2)
    by_hand = (cosines(each[0][1].vector, each[0][1].vector) + cosines(each[1][1].uni, each[1][1].uni)) / 2
    torch.testing.assert_close(own[1].uni @ own[1].uni.T, by_hand)
    assert own[0].vector.shape == (5, again.vector_width)


def test_each_member_prepares_images_as_it_does_alone(tmp_path: Path) -> None:
    members, raw = [pixels(16, 1), pixels(24, 2)], [png(0), png(1), png(2)]
    with torch.no_grad():
        wanted = [m.score(m.encode_images(m.inputs.images(raw)), m.encode_captions(m.inputs.captions(TEXTS))) for m in members]
    save_matcher(Mean.of(members), tmp_path / "mean")
    again = itm.load_matcher(tmp_path / "mean")
    assert isinstance(again.inputs, MeanInputs)
    images, captions = again.inputs.images(raw), again.inputs.captions(TEXTS)
    assert [own.pixels.shape[-1] for own in images.each] == [16, 24]
    torch.testing.assert_close(score_matrix(again, images, captions, batch_size=2), (wanted[0] + wanted[1]) / 2)
    torch.testing.assert_close(score_matrix(again, images[1:], captions), (wanted[0] + wanted[1])[1:] / 2)
    assert [member.inputs.image.size for member in again.averaged] == [16, 24]
    with pytest.raises(ValueError, match=r"give what matcher\.inputs\.images makes"):
        again.encode_images(images.each[0])


def test_rows_of_members_are_sliced_moved_and_stacked_together() -> None:
    one = Encoded(
        vector=torch.arange(6.0).view(3, 2), each=(Encoded(parts=torch.ones(3, 1, 2)), Encoded(vector=torch.arange(3.0)[:, None]))
    )
    chosen = Encoded.cat([one[torch.tensor([2, 0])], one[1:2]])
    assert chosen.each[1].vector[:, 0].tolist() == [2, 0, 1]
    assert (len(chosen), chosen.each[0].parts.shape) == (3, (3, 1, 2))
    assert chosen.to(torch.float64).each[0].parts.dtype == torch.float64
    assert len(Encoded(each=one.each)) == 3
    assert one.host_known


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: made("scan", sees=ImageInput("regions", region_width=8), image={"in_width": 8, "width": 10}), "are 6 and 8 wide"),
        (lambda: made("scan", tokenizer=words("other", "words", "in", "it")), "their tokenizers differ .*vocabulary.json"),
        (lambda: made("scan", tokenizer=words(length=9)), "their tokenizers differ .*text.json"),
        (lambda: pixels(16, 1), "the first reads regions, the second pixels"),
        (lambda: Mean.of([made("scan", 1), made("saf", 2)]), "m/two is a mean itself"),
    ],
)
def test_members_that_read_other_data_are_refused_by_name(other: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        Mean.of([made("sgr"), other()], ["m/one", "m/two"])
    assert "m/two" in str(refused.value)


def test_what_is_no_mean_is_refused_and_a_newer_one_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least two members, not 1"):
        Mean.of([made("sgr")])
    with pytest.raises(ValueError, match="member 2 of a mean has kind and options .*, not sort"):
        Mean(vocab_size=WORDS, members=[{"kind": "saf", "options": {}}, {"sort": "sgr"}])
    save_matcher(Mean.of([made("sgr", 1), made("sgr", 2)]), tmp_path / "mean")
    path = tmp_path / "mean" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    with pytest.raises(NewerFormat, match="format 3, this version reads up to 2"):
        itm.load_matcher(tmp_path / "mean")


def test_a_member_of_a_user_s_own_package_is_imported_only_if_it_is_allowed(tmp_path: Path) -> None:
    save_matcher(Mean.of([made("sgr", 1), made("sgr", 2)]), tmp_path / "mean")
    path = tmp_path / "mean" / "config.json"
    said = json.loads(path.read_text())
    said["options"]["members"][1]["kind"] = "acme.parts:Own"
    path.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"options\.members\.1\.kind='acme\.parts:Own'.*--allow acme"):
        itm.load_matcher(tmp_path / "mean")
