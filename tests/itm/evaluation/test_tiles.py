"""The tile store: ranks streamed from tiles equal the dense matrix, a killed run computes only what is missing, damage is named."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from itm.evaluation.metrics import TIES, rank_queries, retrieval_metrics
from itm.evaluation.scoring import score_matrix
from itm.evaluation.streamed import TiledScores
from itm.evaluation.tiles import Grid, TileStore, fill
from itm.types import Encoded, Matcher
from pipelines.evaluating import driver as evaluate
from pipelines.on_ray.options import How
from tests.support import oracles
from tests.support.small_split import small_run
from tests.support.word_matcher import Words, world


class Given(Matcher):
    """A matcher whose scores are a given matrix: an image is its row number, a caption its column number."""

    def __init__(self, scores):
        super().__init__()
        self.scores = torch.as_tensor(scores)

    def score(self, images, captions):
        return self.scores[images.vector[:, 0].long()][:, captions.vector[:, 0].long()]


def numbers(count: int, lengths=None) -> Encoded:
    mask = None if lengths is None else torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return Encoded(vector=torch.arange(count)[:, None].float(), mask=mask)


def store_of(folder, scores, rows: int, columns: int, lengths=None) -> TileStore:
    images, captions = numbers(len(scores)), numbers(len(scores[0]), lengths)
    store = TileStore.create(str(folder), {"matcher": "given"}, Grid(*np.shape(scores), rows, columns), captions)
    fill(store, [Given(scores)], [(images, captions)], names_of(scores))
    return store


def names_of(scores):
    return [f"image-{i}" for i in range(len(scores))], [f"caption-{t}" for t in range(len(scores[0]))]


@st.composite
def worlds(draw):
    """Scores on a coarse grid (ties, infinities), a ragged truth with and without empty rows, caption lengths, tile sizes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    images, captions = draw(st.integers(1, 12)), draw(st.integers(1, 30))
    scores = rng.integers(0, draw(st.sampled_from([1, 3, 8, 10_000])), (images, captions)).astype(np.float32)
    scores[rng.random(scores.shape) < draw(st.sampled_from([0, 0.2]))] = draw(st.sampled_from([-np.inf, np.inf, -0.0]))
    truth = rng.random((images, captions)) < draw(st.floats(0, 0.6))
    truth[np.arange(images), rng.integers(0, captions, images)] = True
    truth[rng.integers(0, images, captions), np.arange(captions)] = True
    wider = truth | (rng.random(truth.shape) < 0.2)
    return (
        scores,
        truth,
        wider,
        rng.integers(1, 6, captions).tolist(),
        draw(st.integers(-(-images // 3), images)),
        draw(st.integers(-(-captions // 3), captions)),
    )


@settings(max_examples=60, deadline=None)
@given(world=worlds(), tie=st.sampled_from(TIES))
def test_metrics_streamed_from_tiles_equal_those_of_the_dense_matrix_and_of_sorted_lists(tmp_path_factory, world, tie):
    scores, truth, wider, lengths, rows, columns = world
    tiled = TiledScores(store_of(tmp_path_factory.mktemp("store"), scores, rows, columns, lengths))
    got = retrieval_metrics(tiled, torch.from_numpy(truth), torch.from_numpy(wider), tie)
    assert got == retrieval_metrics(torch.from_numpy(scores), torch.from_numpy(truth), torch.from_numpy(wider), tie)
    if tie != "official_iais":
        for way, s, t in (("i2t", scores, truth), ("t2i", scores.T, truth.T)):
            want = oracles.retrieval(s, t, tie)
            assert {name: got[f"{way}_{name}"] for name in ("r1", "r5", "medr", "meanr")} == pytest.approx(
                {name: want[name] for name in ("r1", "r5", "medr", "meanr")}
            )


@settings(max_examples=40, deadline=None)
@given(world=worlds(), tie=st.sampled_from(TIES))
def test_queries_without_positives_ids_in_place_of_a_matrix_and_absent_positives_rank_as_on_the_dense_matrix(tmp_path_factory, world, tie):
    scores, _, _, lengths, rows, columns = world
    tiled, dense = TiledScores(store_of(tmp_path_factory.mktemp("store"), scores, rows, columns, lengths)), torch.from_numpy(scores)
    ids = torch.randint(0, 4, (len(scores),)), torch.randint(0, 5, (scores.shape[1],))
    absent = torch.randint(0, 3, (len(scores),))
    turned = (ids[1], ids[0])
    for got, want in (
        (rank_queries(tiled, ids, tie, absent), rank_queries(dense, ids, tie, absent)),
        (rank_queries(tiled.T, turned, tie), rank_queries(dense.T, turned, tie)),
    ):
        for name in ("best", "positives", "average_precision", "r_precision"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name


def test_dense_rows_are_read_back_in_the_order_of_the_split(tmp_path):
    scores = torch.randn(11, 17)
    tiled = TiledScores(store_of(tmp_path, scores, 4, 5, torch.randint(1, 9, (17,)).tolist()))
    assert torch.equal(tiled[2:9], scores[2:9])
    assert torch.equal(tiled.T[torch.tensor([16, 3, 3])], scores.T[[16, 3, 3]])


def test_a_store_of_a_real_matcher_holds_the_scores_of_score_matrix(tmp_path):
    matcher, (images, captions) = Words(), world()
    with torch.inference_mode():
        encoded = matcher.encode_images(images), matcher.encode_captions(captions)
    store = TileStore.create(str(tmp_path), {}, Grid(7, 33, 3, 8), encoded[1])
    fill(store, [matcher, matcher], [encoded, encoded], (["x"] * 7, ["y"] * 33))
    torch.testing.assert_close(TiledScores(store)[:], score_matrix(matcher, *encoded), atol=1e-6, rtol=0)


def test_a_second_run_computes_only_missing_and_damaged_tiles(tmp_path):
    scores = torch.randn(6, 8)
    store = store_of(tmp_path, scores, 2, 3)
    uris = [Path(store.tile_uri(tile)) for tile in store.grid.tiles]
    before = [uri.stat().st_mtime_ns for uri in uris]
    uris[1].unlink()
    uris[5].write_bytes(uris[5].read_bytes()[:-4])
    Path(store.uri, "store.json").unlink()
    again = store_of(tmp_path, scores, 2, 3)
    changed = [n for n, uri in enumerate(uris) if uri.stat().st_mtime_ns != before[n]]
    assert changed == [1, 5]
    assert torch.equal(TiledScores(again)[:], scores)


def test_another_identity_has_another_folder_and_a_folder_under_a_false_name_is_refused(tmp_path):
    store = store_of(tmp_path, torch.randn(3, 4), 2, 2)
    other = TileStore.create(str(tmp_path), {"matcher": "other"}, store.grid, numbers(4))
    assert other.uri != store.uri and len(other.missing()) == 4
    Path(other.uri, "store.json").write_bytes(Path(store.uri, "store.json").read_bytes())
    with pytest.raises(ValueError, match=r"store.json belongs to other scores \(matcher 'given', wanted 'other'\); delete the folder"):
        TileStore.create(str(tmp_path), {"matcher": "other"}, store.grid, numbers(4))
    with pytest.raises(ValueError, match="captions.npy lists the captions in another order"):
        TileStore.create(str(tmp_path), {"matcher": "given"}, store.grid, numbers(4, [3, 1, 2, 2]))


def test_an_unfinished_store_cannot_be_opened_as_a_finished_one(tmp_path):
    store = store_of(tmp_path, torch.randn(3, 4), 2, 2)
    assert torch.equal(TileStore.open(store.uri).order, store.order)
    Path(store.uri, "store.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(ValueError, match="store.json is no receipt of a score store"):
        TileStore.open(store.uri)
    Path(store.uri, "store.json").unlink()
    with pytest.raises(ValueError, match="has no store.json: scoring was not finished"):
        TileStore.open(store.uri)


def test_a_nan_is_named_with_its_tile_its_image_and_its_caption_and_the_tile_is_not_kept(tmp_path):
    scores = torch.zeros(5, 6)
    scores[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"1 scores of .*tile-00001-00001.npy are NaN, the first at image 'image-3', caption 'caption-1'"):
        store_of(tmp_path, scores, 2, 3, [1, 4, 1, 1, 1, 1])
    assert not list(tmp_path.glob("*/tile-00001-00001.npy"))
    assert not list(tmp_path.glob("*/store.json"))


def test_a_store_that_cannot_be_written_is_refused_before_any_score(tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match="cannot write below"):
        store_of(tmp_path / "runs", torch.zeros(2, 2), 1, 1)


def test_tiles_are_smaller_the_more_a_pair_costs():
    vectors, parts = Encoded(vector=torch.zeros(9000, 1)), Encoded(parts=torch.zeros(9000, 1, 1))
    joint = type("Joint", (Matcher,), {"joint": True})()
    sizes = [Grid.of([m], e, e) for m, e in ((Matcher(), vectors), (Matcher(), parts), (joint, parts))]
    assert [(g.rows, g.columns) for g in sizes] == [(4096, 4096), (512, 512), (128, 128)]


@pytest.mark.e2e
def test_scoring_killed_in_the_middle_goes_on_with_the_missing_tiles_and_ends_with_the_metrics_of_an_undisturbed_run(tmp_path, ray_local):
    recipe = small_run(tmp_path, count=60, evaluation={"block": 1})
    folder = Path(recipe.folder)
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(recipe.model_dump_json())
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen([sys.executable, "-m", "pipelines.evaluate", "-c", recipe_file, "--distributed"], stdout=log, stderr=log)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("scores-*/tile-*.npy"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.01)
    process.kill()
    process.wait()
    store = next(folder.glob("scores-*"))
    assert not (store / "store.json").exists()
    time.sleep(1)  # tasks on their way end with their driver
    finished = {tile: tile.stat().st_mtime_ns for tile in store.glob("tile-?????-?????.npy")}
    assert 5 <= len(finished) < 60
    result = evaluate.evaluate(recipe, how=How(distributed=True), save_scores=str(tmp_path / "scores.npy"))
    assert {tile: tile.stat().st_mtime_ns for tile in finished} == finished
    assert len(list(store.glob("*.npy"))) == 61
    shutil.rmtree(store)
    undisturbed = evaluate.evaluate(recipe, how=How(distributed=True), save_scores=str(tmp_path / "again.npy"))
    when = ("seconds", "environment")
    assert {k: v for k, v in undisturbed.items() if k not in when} == {k: v for k, v in result.items() if k not in when}
    assert (tmp_path / "again.npy").read_bytes() == (tmp_path / "scores.npy").read_bytes()
    dense = evaluate.evaluate(recipe, save_scores=str(tmp_path / "dense.npy"))
    np.testing.assert_allclose(np.load(tmp_path / "again.npy"), np.load(tmp_path / "dense.npy"), atol=1e-6)
    assert dense["metrics"] == pytest.approx(result["metrics"], abs=1.0)
