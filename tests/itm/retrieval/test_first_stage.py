"""First stages: what they propose is scored exactly, and what they lose is what they say."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from itm.evaluation.screen import wilson
from itm.retrieval import approximate
from itm.retrieval.approximate import Approximate, held_out
from itm.retrieval.engine import Engine, Question
from itm.retrieval.index import Index
from itm.retrieval.sides import Held
from itm.types import Encoded
from pipelines.indexing.building import Wanted, build
from pipelines.indexing.settings import Chosen, settle
from tests.support.disc_index import SCAN, write_discs
from tests.support.registry_world import matcher_folder, picture, tiny_matcher

needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="NOT TESTED: faiss is not installed (extra `faiss`)")
QUESTIONS = [Question("a red circle", k=3), Question(image=picture("red"), find="captions", k=4)]


def clustered(rows: int, seed: int) -> torch.Tensor:
    """Unit vectors (N,32) around 40 centres that are the same for each seed."""
    centres = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(centres[torch.randint(40, (rows,), generator=draw)] + 0.7 * torch.randn(rows, 32, generator=draw), dim=1)


@needs_faiss
@pytest.mark.parametrize(("wanted", "kind"), [(0.9, "ivf"), (0.98, "hnsw")])
def test_the_recall_that_is_stated_is_that_of_questions_which_chose_nothing(wanted, kind, tmp_path):
    rows = clustered(3000, 1)
    chose, held = held_out(clustered(400, 2), 100)
    made, measured = Approximate.build(Held(Encoded(vector=rows)), wanted, (chose, held))
    assert (measured.kind, measured.questions, measured.rows) == (kind, 100, 3000)
    exact = np.argsort(-(held.double() @ rows.double().T).numpy(), axis=1)[:, :10]
    made.write(str(tmp_path / "images.faiss"))
    again = Approximate.read(str(tmp_path / "images.faiss"), kind, made.effort)
    found = again.propose(held, 10).numpy()
    hits = sum(len(set(a) & set(b)) for a, b in zip(exact.tolist(), found.tolist(), strict=True))
    assert measured.recall == hits / 1000
    assert (measured.low, measured.high) == wilson(hits, 1000)
    assert measured.high >= wanted


def test_the_questions_that_measure_are_not_those_that_chose():
    questions = torch.arange(90.0)[:, None]
    chose, held = held_out(questions, 30)
    assert len(chose) == len(held) == 30
    assert not set(chose.flatten().tolist()) & set(held.flatten().tolist())


@needs_faiss
def test_an_index_with_faiss_answers_with_exact_scores_and_filters_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(approximate, "LEAST_ROWS", 4)
    matcher = tiny_matcher(2)
    wanted = Wanted(matcher, (write_discs(tmp_path / "test"),), str(tmp_path / "index"), device="cpu")
    catalogue = build(wanted)
    assert catalogue is not None
    exact = Engine(matcher, Index.open(wanted.output, matcher), "cpu").answer(QUESTIONS)
    lines = settle(wanted, catalogue, Chosen(recall=0.5, sample=3))
    assert [line.split(":")[0] for line in lines] == ["faiss, images", "faiss, captions"]
    engine = Engine(matcher, Index.open(wanted.output, matcher), "cpu")
    assert engine.first.quickly(QUESTIONS[0])
    for found, other in zip(engine.answer(QUESTIONS), exact, strict=True):
        assert [hit.key for hit in found.hits] == [hit.key for hit in other.hits]
        assert [hit.score for hit in found.hits] == pytest.approx([hit.score for hit in other.hits], abs=1e-6)
    assert not engine.first.quickly(replace(QUESTIONS[0], where={"split": ["test"]}))
    assert not engine.first.quickly(Question(image=picture("red")))
    (tmp_path / "index" / "images.faiss").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"images.faiss, which the index needs, cannot be read .*: run `itm index --faiss` again"):
        Engine(matcher, Index.open(wanted.output, matcher), "cpu")


@pytest.mark.parametrize(("recall", "rows", "said"), [(1.5, 3000, "recall=1.5 is no recall"), (0.9, 50, "50 rows are searched exactly")])
def test_a_recall_that_is_none_and_few_rows_are_refused(recall, rows, said):
    with pytest.raises(ValueError, match=said):
        Approximate.build(Held(Encoded(vector=clustered(rows, 1))), recall, held_out(clustered(20, 2), 10))


@pytest.mark.parametrize("by", ["own", "dual"])
def test_a_screened_index_scores_what_is_proposed_and_says_what_it_loses(by, tmp_path):
    matcher = tiny_matcher(2, SCAN)
    wanted = Wanted(matcher, (write_discs(tmp_path / "test"),), str(tmp_path / "index"), device="cpu")
    catalogue = build(wanted)
    assert catalogue is not None
    exact = Engine(matcher, Index.open(wanted.output, matcher), "cpu").answer(QUESTIONS)
    screen = "own" if by == "own" else str(matcher_folder(tmp_path / "dual", 5))
    lines = settle(wanted, catalogue, Chosen(screen, loss=0.5, sample=99))
    assert lines[0] == f"screen by {screen}: the best 10 are scored exactly"
    index = Index.open(wanted.output, matcher)
    assert index.settings["screen"]["measured"]["t2i"]["r10"]["lost"] == 0  # six images are fewer than ten candidates
    engine = Engine(matcher, index, "cpu")
    assert engine.rerank == 10
    for found, other in zip(engine.answer(QUESTIONS), exact, strict=True):
        assert [hit.key for hit in found.hits] == [hit.key for hit in other.hits]
    few = Engine(matcher, index, "cpu", rerank=3).answer(QUESTIONS[:1])[0].hits
    proposer = tiny_matcher(5) if by == "dual" else matcher
    with torch.no_grad():
        images = Index.open(wanted.output + "/screen" * (by == "dual")).images.read(slice(0, 6)).vector
        text = proposer.encode_captions(proposer.inputs.captions(["a red circle"])).vector
    assert {hit.key for hit in few} == {f"k{n}" for n in F.cosine_similarity(images, text).topk(3).indices.tolist()}


def test_a_screen_without_captions_to_ask_with_or_with_too_few_is_refused(tmp_path: Path):
    matcher = tiny_matcher(2, SCAN)
    wanted = Wanted(matcher, (write_discs(tmp_path / "test"),), str(tmp_path / "index"), device="cpu")
    catalogue = build(wanted)
    assert catalogue is not None
    with pytest.raises(ValueError, match="2 sampled queries cannot show a loss of at most 1.00%: sample 381"):
        settle(wanted, catalogue, Chosen("own", loss=0.01, sample=2))
    with pytest.raises(ValueError, match="--loss 7 is no share"):
        settle(wanted, catalogue, Chosen("own", loss=7))
