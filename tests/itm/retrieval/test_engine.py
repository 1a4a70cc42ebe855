"""The engine: answers are those of scoring every pair, whatever is asked together, filtered, paged or screened."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from itm.data.shards import Sample
from itm.retrieval import stored
from itm.retrieval.asking import over
from itm.retrieval.engine import Engine, Question
from itm.retrieval.index import Index
from itm.retrieval.store import read_rows, write_rows
from itm.retrieval.stored import Stored
from itm.types import Encoded, Matcher
from tests.support.disc_index import COLOURS, SCAN, texts_of, write_discs
from tests.support.registry_world import picture, tiny_matcher

RAW = [picture(colour, 32 + n) for n, colour in enumerate(COLOURS)]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_discs(tmp_path_factory.mktemp("shards") / "test")


@pytest.fixture(scope="module")
def vectors() -> Matcher:
    return tiny_matcher(2)


@pytest.fixture(scope="module")
def late() -> Matcher:
    return tiny_matcher(2, SCAN)


def engine(matcher: Matcher, split: str, **given) -> Engine:
    return Engine(matcher, Index.of_shards(matcher, split), "cpu", **given)


@torch.no_grad()
def every_pair(matcher: Matcher, texts: list[str], images: list[bytes] = RAW) -> torch.Tensor:
    encoded = matcher.encode_images(matcher.inputs.images(images)), matcher.encode_captions(matcher.inputs.captions(texts))
    return matcher.score(*encoded)


@pytest.mark.parametrize("kind", ["vectors", "late"])
def test_questions_asked_together_are_answered_as_each_is_alone(kind, split, request):
    matcher = request.getfixturevalue(kind)
    asks = engine(matcher, split)
    texts = ["a red circle", "a circle left", "a red circle", "blue"]
    questions = [Question(text, k=6) for text in texts] + [Question(image=RAW[1], find="captions", k=12)]
    together = asks.answer(questions)
    wanted = every_pair(matcher, texts)
    for n, found in enumerate(together[:4]):
        assert {hit.key: hit.score for hit in found.hits} == pytest.approx({f"k{r}": float(wanted[r, n]) for r in range(6)}, abs=1e-5)
    captions = every_pair(matcher, [text for colour in COLOURS for text in texts_of(colour)])[1]
    found = {hit.caption_ids[0]: hit.score for hit in together[4].hits}
    assert found == pytest.approx({f"k{n // 2}-{n % 2}": float(score) for n, score in enumerate(captions)}, abs=1e-5)
    for question, found in zip(questions, together, strict=True):
        alone = asks.answer([question])[0]
        assert [(h.key, h.captions) for h in alone.hits] == [(h.key, h.captions) for h in found.hits]


@pytest.mark.parametrize("dtype", ["fp16", "int8", "fp32"])
def test_vectors_that_come_in_pieces_are_those_of_one_read(dtype, tmp_path, monkeypatch):
    places = [str(tmp_path / f"{n}.arrow") for n in range(3)]
    vectors = torch.randn(11, 8, generator=torch.Generator().manual_seed(0))
    for place, rows in zip(places, vectors.split([4, 1, 6]), strict=True):
        write_rows(place, {}, {}, Encoded(vector=rows), dtype)
    side = Stored([read_rows(place) for place in places])
    monkeypatch.setattr(stored, "CACHED", 24)
    pieces = [piece.vector.clone() for piece in side.pieces(slice(1, 10))]
    assert [len(piece) for piece in pieces] == [3, 1, 3, 2]
    assert torch.equal(torch.cat(pieces), side.read(slice(1, 10)).vector)
    question = torch.ones(1, 8)
    scores = over(lambda rows: question @ rows.vector.T, side, slice(0, 11))
    assert scores == pytest.approx(question @ side.read(slice(0, 11)).vector.T, abs=1e-6)


def test_pages_follow_each_other_and_equal_scores_keep_their_order(split, vectors):
    asks = engine(vectors, split)
    whole = asks.answer([Question("a red circle", k=6)])[0].hits
    pages = [hit for offset in (0, 2, 4) for hit in asks.answer([Question("a red circle", k=2, offset=offset)])[0].hits]
    assert pages == whole
    assert [hit.rank for hit in pages] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("where", "keys"),
    [
        ({"shard": ["00001.tar"]}, {"k3", "k4", "k5"}),
        ({"key": ["k1", "k4"], "split": ["test"]}, {"k1", "k4"}),
        ({"key": ["k*"], "shard": ["00000*"]}, {"k0", "k1", "k2"}),
        ({"split": ["train"]}, set()),
    ],
)
def test_a_filter_leaves_the_images_that_pass_it(where, keys, split, vectors):
    asks = engine(vectors, split)
    images, captions = asks.answer([Question("a red circle", k=9, where=where), Question(image=RAW[0], find="captions", k=99, where=where)])
    assert {hit.key for hit in images.hits} == {hit.key for hit in captions.hits} == keys
    assert len(captions.hits) == 2 * len(keys)


def test_a_text_and_an_image_add_their_standardised_scores(split, vectors):
    found = engine(vectors, split).answer([Question("a red circle", RAW[3], k=6)])[0].hits
    images = F.normalize(vectors.encode_images(vectors.inputs.images(RAW)).vector.detach(), dim=1)
    parts = every_pair(vectors, ["a red circle"])[:, 0], images @ images[3]
    wanted = sum((p - p.mean()) / p.std(correction=0) for p in parts)
    assert {hit.key: hit.score for hit in found} == pytest.approx({f"k{n}": float(v) for n, v in enumerate(wanted)}, abs=1e-4)


def test_screened_answers_carry_exact_scores_and_all_candidates_are_the_exact_answer(split, late):
    exact = engine(late, split).answer([Question("a red circle", k=2)])[0].hits
    assert engine(late, split, rerank=6).answer([Question("a red circle", k=2)])[0].hits == exact
    images = late.encode_images(late.inputs.images(RAW)).vector
    caption = late.encode_captions(late.inputs.captions(["a red circle"])).vector
    proposed = F.cosine_similarity(images, caption).topk(3).indices.tolist()
    some = engine(late, split, rerank=3).answer([Question("a red circle", k=3)])[0].hits
    assert {hit.key for hit in some} == {f"k{n}" for n in proposed}
    wanted = every_pair(late, ["a red circle"])[:, 0]
    assert [hit.score for hit in some] == pytest.approx(sorted((float(wanted[n]) for n in proposed), reverse=True), abs=1e-5)


def test_a_calibrated_engine_says_how_likely_an_answer_is_and_leaves_out_what_is_not(split, vectors):
    def share_below(scores, background, find):
        return (scores[:, None] > background).float().mean(1)

    asks = engine(vectors, split, calibration=share_below)
    hits = asks.answer([Question("a red circle", k=6)])[0].hits
    assert [hit.probability for hit in hits] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0], abs=1e-6)
    assert asks.answer([Question("a red circle", k=6, min_score=0.6)])[0].hits == hits[:2]


def test_an_explanation_is_the_attention_of_the_matcher_over_boxes_in_pixels(split, late):
    told = engine(late, split).explain(Question("a red circle"), "k4")
    with torch.no_grad():
        one = late.encode_images(late.inputs.images([RAW[4]])), late.encode_captions(late.inputs.captions(["a red circle"]))
        weights = late.attention(*one)[0]
    assert told.words == ["a", "red", "circle"]
    assert torch.tensor(told.weights) == pytest.approx(weights[1:4], abs=1e-6)
    assert (told.width, told.height, told.grid) == (36, 36, True)
    assert told.boxes[0][:2] == [0, 0]
    assert told.boxes[-1][2:] == [36, 36]
    assert isinstance(engine(late, split).index.sample("k4"), Sample)


@pytest.mark.parametrize(
    ("question", "said"),
    [
        (Question(), "neither a text nor an image"),
        (Question("x", k=0), "ask for at least one answer"),
        (Question("x", offset=-1), "offset is -1"),
        (Question("x", find="words"), "find='words' is unknown"),  # type: ignore[arg-type]
        (Question("x", where={"colours": ["red"]}), "no column 'colours' to filter by; it has key, shard, split"),
        (Question("x", where={"split": []}), "the filter 'split' names no value"),
        (Question("x", min_score=0.5), "needs calibrated scores"),
        (Question(image=b"no photo"), "cannot decode image"),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused_in_a_sentence(question, said, split, vectors):
    with pytest.raises(ValueError, match=said):
        engine(vectors, split).answer([question])


def test_a_dual_encoder_has_no_attention_to_explain_with(split, vectors):
    asks = engine(vectors, split)
    with pytest.raises(ValueError, match="dual encoders have no attention"):
        asks.explain(Question("a red circle"), "k0")
    with pytest.raises(ValueError, match="holds no image 'k77'; keys look like 'k0'"):
        asks.explain(Question("a red circle"), "k77")
