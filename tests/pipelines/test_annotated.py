"""Flickr30k Entities over UNITER's databases: packed, and what `itm evaluate --protocol isda` makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from itm.config import Recipe, parse_recipe
from itm.data.manifest import Receipt
from itm.data.shards import Sample, read_manifest, read_samples
from pipelines import pack
from pipelines.cli import stage_main
from tests.support import authors_layouts

TEXTS, IMAGES = "data/uniter/txt_db/itm_flickr30k_test_base-cased.db", "data/uniter/img_db/flickr30k/feat_th0.2_max100_min10"


def entities(folder: Path, without: int | None = None) -> None:
    """The first word of a caption means the first box and the last one the second; boxes are those of the image's first two regions."""
    from itm.data.sources.uniter_db import ImageDatabase

    for name in ("Sentences", "Annotations"):
        (folder / name).mkdir(parents=True)
    database = ImageDatabase(Path(IMAGES).absolute())
    for archive in json.loads(Path(TEXTS, "img2txts.json").read_text()):
        number = int(archive.removesuffix(".npz").rpartition("_")[2])
        lines = []
        for text in authors_layouts.captions(number):
            first, *middle, last = text.removesuffix(" .").split()
            lines.append(" ".join([f"[/EN#7/people {first}]", *middle, f"[/EN#8/other {last}]", "."]))
        (folder / "Sentences" / f"{number}.txt").write_text("\n".join(lines))
        boxes = (database.arrays(archive)["norm_bb"][:2, :4].astype(float) * [500, 400, 500, 400]).tolist()
        objects = "".join(
            f"<object><name>{entity}</name><bndbox>"
            + "".join(f"<{c}>{v}</{c}>" for c, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
            + "</bndbox></object>"
            for entity, box in zip((7, 8), boxes, strict=True)
        )
        size = "<size><width>500</width><height>400</height></size>"
        if number != without:
            (folder / "Annotations" / f"{number}.xml").write_text(f"<annotation>{size}{objects}</annotation>")


def recipe(folder: Path) -> Recipe:
    inner = {"kind": "uniter_db", "options": {"texts": {"test": TEXTS}, "images": IMAGES, "vocab": "data/uniter/vocab.txt"}}
    source = {"kind": "flickr30k_entities", "options": {"path": "entities", "regions": inner}}
    data = {"source": source, "root": f"{folder}/shards", "image": "regions", "max_regions": 100}
    return parse_recipe({"name": "annotated", "output": f"{folder}/runs", "data": data, "model": {"kind": "uniter", "options": {}}})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        pack, "_run_jobs", lambda recipe, jobs, title: {j.uri: Receipt.model_validate_json(pack.pack_shard(j)) for j in jobs}
    )
    authors_layouts.uniter(tmp_path, "f30k")
    return tmp_path


def test_word_pieces_of_the_databases_keep_their_phrases_and_isda_measures_every_pair(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entities(folder / "entities")
    chosen = recipe(folder)
    pack.pack(chosen)
    split = f"{chosen.data.root}/test"
    samples = [s for shard in read_manifest(split).shards for s in read_samples(f"{split}/{shard.name}") if isinstance(s, Sample)]
    said = [caption for sample in samples for caption in sample.captions]
    assert len(said) == 5 * authors_layouts.TEST
    for caption in said:
        words = caption.text.split()
        (first, last), found = (words[0], words[-1]), caption.meta["entities"]
        assert [[caption.text[a:b] for a, b in entity["spans"]] for entity in found] == [[first], [last]]
        assert [place in entity["regions"] for place, entity in enumerate(found)] == [True, True]
    authors_layouts.weights(folder)
    Path("annotated.yaml").write_text(chosen.model_dump_json())
    assert stage_main("evaluate", ["-c", "annotated.yaml", "--protocol", "isda", "--matcher", "weights/uniter"]) == 0
    result = json.loads(next(Path(chosen.folder).glob("evaluation-isda-*.json")).read_text())
    assert result["counts"]["pairs"] == len(said)
    assert result["metrics"]["isda_sum"] == pytest.approx(2 * result["metrics"]["isda_mean"])
    assert "isda_mean" in capsys.readouterr().out


def test_an_image_without_its_annotation_is_counted_and_too_many_stop_the_stage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entities(folder / "entities", without=authors_layouts.first_number("f30k", "test"))
    Path("annotated.yaml").write_text(recipe(folder).model_dump_json())
    assert stage_main("pack", ["-c", "annotated.yaml"]) == 2
    assert "1 of 10" in (said := capsys.readouterr().err) and "max_reject_rate" in said
    assert stage_main("pack", ["-c", "annotated.yaml", "data.max_reject_rate=0.2"]) == 0
    (row,) = [json.loads(line) for line in Path(f"{folder}/shards/test/quarantine.jsonl").read_text().splitlines()]
    assert ".xml cannot be read" in row["reason"] and row["captions"] == 5
