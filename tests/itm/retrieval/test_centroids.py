"""The first stage by centroids: what it proposes is what its rule says, computed one pair at a time, and an index only grows."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from itm.data.manifest import write_manifest
from itm.data.shards import read_manifest, write_shard
from itm.retrieval.centroids import Centroids, k_means, write_centroids
from itm.retrieval.engine import Engine, Question
from itm.retrieval.index import Index
from itm.types import Encoded, Matcher
from pipelines.indexing.building import Wanted, build
from pipelines.indexing.settings import Chosen, settle
from tests.support.disc_index import SCAN, disc, write_discs
from tests.support.registry_world import picture, tiny_matcher


@pytest.fixture(scope="module")
def late() -> Matcher:
    return tiny_matcher(2, SCAN)


def settled(matcher: Matcher, split: str, output: Path, add: bool = False) -> list[str]:
    wanted = Wanted(matcher, (split,), str(output), device="cpu", add=add)
    catalogue = build(wanted)
    assert catalogue is not None
    return settle(wanted, catalogue, Chosen("centroids", loss=0.5, sample=99))


def column(path: Path, name: str) -> list:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()[name].to_pylist()


def one_by_one(asked: Encoded, centroids: np.ndarray, codes: list[list[int]]) -> list[list[float]]:
    """Scores of questions with rows: the mean over the parts asked of the best cosine, a part and a centroid at a time."""
    found = []
    for parts, mask in zip(asked.parts.numpy(), asked.mask.numpy(), strict=True):
        real = [part / np.linalg.norm(part) for part in parts[mask]]
        found.append([float(np.mean([max(float(part @ centroids[c]) for c in row) for part in real])) for row in codes])
    return found


@pytest.mark.parametrize("find", ["images", "captions"])
def test_scores_are_the_best_of_a_rows_centroids_averaged_over_words(find, late, tmp_path):
    settled(late, write_discs(tmp_path / "test"), tmp_path / "index")
    index = Index.open(str(tmp_path / "index"), late)
    coded = Centroids.read(index, find)
    stems = ("00000", "00001")
    suffix = "centroids" if find == "images" else "captions.centroids"
    codes = [row for stem in stems for row in column(tmp_path / "index" / "test" / f"{stem}.{suffix}.arrow", "codes")]
    vectors = np.array(column(tmp_path / "index" / f"{find}.centroids.arrow", "vector"), np.float32)
    side, other = (index.images, index.captions) if find == "images" else (index.captions, index.images)
    kept = side.read(slice(0, len(side)))
    for row, parts, mask in zip(codes, kept.parts.numpy(), kept.mask.numpy(), strict=True):
        near = [int((part / np.linalg.norm(part) @ vectors.T).argmax()) for part in parts[mask]]
        assert row == sorted(set(near))
    asked = other.read(slice(0, 5))
    wanted = torch.tensor(one_by_one(asked, vectors, codes))
    assert coded.scores(asked, slice(0, len(codes))) == pytest.approx(wanted, abs=1e-5)
    rows = torch.tensor([4, 0, 3])
    assert coded.scores(asked, rows) == pytest.approx(wanted[:, rows], abs=1e-5)


def test_the_engine_scores_exactly_what_the_centroids_propose(late, tmp_path):
    lines = settled(late, write_discs(tmp_path / "test"), tmp_path / "index")
    assert lines[0].startswith("centroids: ")
    assert lines[1] == "screen by centroids: the best 10 are scored exactly"
    index = Index.open(str(tmp_path / "index"), late)
    assert index.settings["screen"]["measured"]["t2i"]["r10"]["lost"] == 0  # six images are fewer than ten candidates
    exact = {hit.key: hit.score for hit in Engine(late, index, "cpu", rerank=99).answer([Question("a red circle", k=6)])[0].hits}
    few = Engine(late, index, "cpu", rerank=3).answer([Question("a red circle", k=3)])[0].hits
    with torch.no_grad():
        text = late.encode_captions(late.inputs.captions(["a red circle"]))
    best = Centroids.read(index, "images").scores(text, slice(0, 6))[0].topk(3).indices
    assert {hit.key: hit.score for hit in few} == pytest.approx({f"k{row}": exact[f"k{row}"] for row in best.tolist()}, abs=1e-5)
    filtered = Engine(late, index, "cpu", rerank=1).answer([Question("a red circle", k=1, where={"colour": ["blue"]})])[0].hits
    assert {hit.key for hit in filtered} <= {"k1", "k5"}
    both = Engine(late, index, "cpu", rerank=3).answer([Question("a red circle", picture("red"), k=2)])[0].hits
    assert len(both) == 2, "a text and an image together are screened by vectors"


def test_what_is_added_gets_centroids_that_are_there_and_nothing_else_is_written_again(late, tmp_path):
    split = write_discs(tmp_path / "test")
    settled(late, split, tmp_path / "index")
    before = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "index").rglob("*.centroids.arrow")}
    times = {p: p.stat().st_mtime_ns for p in before}
    manifest = read_manifest(split)
    more = write_shard(f"{split}/00002.tar", [disc(6, "red"), disc(7, "white")])
    write_manifest(split, manifest.model_copy(update={"shards": [*manifest.shards, more]}))
    settled(late, split, tmp_path / "index", add=True)
    assert {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in before} == before
    assert {p: p.stat().st_mtime_ns for p in before} == times
    index = Index.open(str(tmp_path / "index"), late)
    assert len(Centroids.read(index, "images")) == 8
    assert len(Engine(late, index, "cpu", rerank=8).answer([Question("a red circle", k=8)])[0].hits) == 8


def test_an_index_without_parts_and_codes_that_are_lost_are_refused_in_a_sentence(late, tmp_path):
    dual = tiny_matcher(2)
    split = write_discs(tmp_path / "test")
    with pytest.raises(ValueError, match="has no parts to compare: --screen centroids is for one late interaction"):
        settled(dual, split, tmp_path / "dual")
    settled(late, split, tmp_path / "index")
    (tmp_path / "index" / "test" / "00001.centroids.arrow").unlink()
    with pytest.raises(ValueError, match=r"00001.centroids.arrow is missing, or of other centroids .*: run `itm index --screen centroids`"):
        Engine(late, Index.open(str(tmp_path / "index"), late), "cpu")
    assert write_centroids(Index.open(str(tmp_path / "index"), late))["images"] > 1
    Engine(late, Index.open(str(tmp_path / "index"), late), "cpu")


def test_centroids_are_the_directions_that_parts_lie_around():
    draw = torch.Generator().manual_seed(0)
    truth = F.normalize(torch.randn(12, 32, generator=draw), dim=1)
    parts = F.normalize(truth[torch.arange(600) % 12] + 0.05 * torch.randn(600, 32, generator=draw), dim=1)
    found = k_means(parts, 40)
    assert found.norm(dim=1) == pytest.approx(torch.ones(40), abs=1e-5)
    assert float((truth @ found.T).amax(1).min()) > 0.97
    assert len(k_means(parts[:5], 40)) == 5
