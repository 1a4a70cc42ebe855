"""`itm inspect` of soft-label stores: a true, a shuffled and a constant store tell themselves apart, on figures and to the eye."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from itm.config import Part
from itm.data import sidecar
from itm.data.shards import read_manifest
from itm.data.sidecar import open_store
from itm.teachers import inspection as figures_of
from pipelines.cli import stage_main
from pipelines.teaching import driver as stage
from pipelines.teaching import inspection
from tests.support.small_teaching import SHUFFLED, SHUFFLED_TEXT, pack, recipe, samples, scenes

pytest_plugins = ["tests.support.teaching_fixtures"]

COUNT = 60


def constant_store(root: Path, modality: str) -> str:
    """As a teacher that gives one vector for everything would have left it."""
    manifest = read_manifest(str(root / "train"))
    identity, headers = {"kind": "constant", "model": "one"}, {}
    uri = root / "train" / "teachers" / sidecar.teacher_id(identity)
    like = open_store(str(next(f.parent for f in (root / "train" / "teachers").glob(f"scenes-{modality}-*/store.json"))))
    for shard in manifest.shards:
        rows = like.sidecar(shard.name)
        header = sidecar.Header(identity, modality, "fp16", shard.name, shard.sha256)
        vectors = np.tile(np.arange(1, 9, dtype=np.float32), (len(rows.keys), 1))
        headers[shard.name] = sidecar.write_sidecar(str(uri / f"{shard.name[:-4]}.arrow"), header, rows.keys, vectors, rows.captions)
    choice = {"modality": modality, "kind": "constant", "options": {}, "dtype": "fp16"}
    return sidecar.write_store(str(root / "train" / "teachers"), choice, headers, identity)


@pytest.fixture
def taught(here):
    pack(here, scenes(COUNT), per_shard=20)
    stage.teach(recipe(here, SHUFFLED, SHUFFLED_TEXT))
    return here


def labels_by_hand(vectors: np.ndarray, tau: float) -> np.ndarray:
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    weights = np.exp(unit @ unit.T / tau)
    return weights / weights.sum(1, keepdims=True)


def test_true_shuffled_and_constant_stores_tell_themselves_apart(taught):
    constant_store(taught, "image")
    found = inspection.inspect(str(taught / "train" / "teachers"))
    kinds = [f"{f.store.identity['kind']} {f.store.modality}" for f in found.figures]
    by = dict(zip(kinds, found.figures, strict=True))
    at = kinds.index
    true, shuffled, constant = by["scenes_image image"], by["shuffled image"], by["constant image"]
    assert true.words[0] > 5 * true.words[1] > 0
    assert by["scenes_text text"].words[0] > 5 * by["scenes_text text"].words[1]
    for control in (shuffled, by["shuffled text"]):
        assert control.words[0] < 0.1 < true.words[0]
    assert true.agreement[at("scenes_text text")] > 0.2
    assert abs(true.agreement[at("shuffled image")]) < 0.15
    assert true.entropy == pytest.approx(shuffled.entropy, rel=0.1), "only the meaning is gone"
    assert (constant.equal, constant.tau, constant.constant) == (1.0, None, True)
    assert list(constant.entropy.values()) == pytest.approx([np.log(COUNT)] * 6)
    assert all(0.02 < f.tau < 1 for f in (true, shuffled))
    assert not found.healthy
    assert "constant: all vectors are equal" in found.text()


def test_the_figures_of_a_batch_of_all_samples_are_those_computed_by_hand(taught):
    store = open_store(str(next((taught / "train" / "teachers").glob("scenes-image-*"))))
    (found,) = figures_of.inspect_stores([store], batch=COUNT)
    vectors = np.concatenate([store.sidecar(shard).vectors for shard in store.shards])
    for tau in (0.05, 0.2, 1.0):
        labels = labels_by_hand(vectors, tau)
        assert found.off[tau] == pytest.approx(1 - np.diag(labels).mean(), abs=1e-6)
        assert found.entropy[tau] == pytest.approx(-(labels * np.log(labels)).sum(1).mean(), abs=1e-6)
    twins = [tuple(v) for v in vectors.tolist()]
    assert found.equal == pytest.approx(np.mean([twins.count(v) > 1 for v in twins]))
    own = np.array([[a == b for b in twins] for a in twins])
    assert (
        (labels_by_hand(vectors, found.tau * 0.98) * own).sum(1).mean()
        > 0.5
        > (labels_by_hand(vectors, found.tau * 1.02) * own).sum(1).mean()
    )


def test_neighbours_are_the_nearest_rows_of_other_samples(taught):
    store = open_store(str(next((taught / "train" / "teachers").glob("scenes-text-*"))))
    (found,) = figures_of.inspect_stores([store])
    names = [(r.key, c.id) for r in samples(taught) for c in r.captions]
    vectors = np.concatenate([store.sidecar(shard).vectors.astype(np.float64) for shard in store.shards])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert len(found.neighbours) == 20
    for asked in found.neighbours:
        own = names.index((asked.query.place[1], asked.query.caption))
        cosines = np.array([-2.0 if name[0] == names[own][0] else float(v @ vectors[own]) for name, v in zip(names, vectors, strict=True)])
        assert [r.score for r in asked.found] == pytest.approx(np.sort(cosines)[::-1][:10].tolist(), abs=1e-5)
        for row in asked.found:
            assert cosines[names.index((row.place[1], row.caption))] == pytest.approx(row.score, abs=1e-5)


def test_one_row_without_a_vector_is_counted_and_not_drawn(here):
    from itm.data.records import Record

    records = scenes(12)
    records[5] = Record(records[5].key, "train", records[5].captions, b"\x89PNG not an image", "png", None, records[5].meta)
    pack(here, records)
    uri = stage.teach(recipe(here, {"kind": "statistics"}, max_reject_rate=0.2))["image"]
    (found,) = inspection.inspect(uri).figures
    assert (found.rows, found.scored, found.batch) == (12, 11, 11)
    assert any("1 rows have no vector" in said for said in found.remarks)


def test_the_command_prints_the_figures_and_writes_a_page_without_scripts(taught, capsys):
    root = taught / "train" / "teachers"
    assert stage_main("inspect", [str(root), "--batch", "16"]) == 0
    said = capsys.readouterr().out
    assert "suggested temperature" in said
    assert "in a batch of 16" in said
    page = (root / "neighbours.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 * 20 * 11, "two image stores, each query with ten neighbours"
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    (caption, *_) = samples(taught)[0].captions
    assert caption.text in page


def test_one_store_and_one_of_shards_elsewhere(taught, capsys, tmp_path_factory):
    store = next((taught / "train" / "teachers").glob("scenes-text-*"))
    moved = tmp_path_factory.mktemp("elsewhere") / store.name
    store.rename(moved)
    assert stage_main("inspect", [str(moved)]) == 0
    assert "--shards" in capsys.readouterr().out
    assert stage_main("inspect", [str(moved), "--shards", str(taught / "train")]) == 0
    assert "--shards" not in capsys.readouterr().out
    assert "data:image" not in (moved / "neighbours.html").read_text()


def test_a_store_of_other_shards_or_half_written_is_left_out_by_name(taught, capsys):
    half = next((taught / "train" / "teachers").glob("scenes-text-*"))
    (half / "store.json").unlink()
    assert stage_main("inspect", [str(taught / "train" / "teachers")]) == 1
    assert f"left out: {half.name}: no finished soft-label store" in capsys.readouterr().out
    assert stage_main("inspect", [str(half)]) == 2
    assert "store.json is missing" in capsys.readouterr().err
    pack(taught, scenes(COUNT + 1)[1:], per_shard=20)
    assert stage_main("inspect", [str(taught / "train" / "teachers")]) == 2
    assert "another version of 00000.tar" in capsys.readouterr().err


def test_a_page_is_written_once_for_each_state_of_a_store(taught):
    uri = stage.teach(recipe(taught, SHUFFLED["options"]["of"]))["image"]
    page = Path(inspection.page_of(uri, str(taught / "train")))
    first = page.stat().st_mtime_ns
    assert inspection.page_of(uri, str(taught / "train")) == str(page)
    assert page.stat().st_mtime_ns == first
    assert Part(**SHUFFLED["options"]["of"]).kind in page.read_text().replace("-", "_")
    pack(taught, scenes(COUNT + 5), per_shard=20)
    assert stage.teach(recipe(taught, SHUFFLED["options"]["of"]))["image"] == uri
    inspection.page_of(uri, str(taught / "train"))
    assert page.stat().st_mtime_ns > first


@pytest.mark.parametrize("seed", range(3))
def test_the_suggested_temperature_follows_the_spread_of_the_cosines(seed):
    draw = np.random.default_rng(seed)
    common = draw.normal(size=256)
    taus = []
    for share in (0.5, 1.0, 2.0):
        cosines = figures_of._cosines(share * common + draw.normal(size=(64, 256)))
        taus.append(figures_of.suggested_tau([cosines], [np.eye(64, dtype=bool)]))
    assert taus == sorted(taus, reverse=True), "the nearer all rows are, the lower"
    same = np.ones((64, 64))
    assert figures_of.suggested_tau([same], [same.astype(bool)]) is None
    assert figures_of.suggested_tau([same], [np.eye(64, dtype=bool)]) is None, "as good as equal"
