"""A table of positives: recalls, mAP@R and R-precision equal to a plain loop over sorted galleries, in every format of the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from itm.evaluation.dataset import Names
from itm.evaluation.positives import read_table
from itm.evaluation.protocols import Scored, run_protocol
from pipelines.cli import stage_main
from tests.support.small_split import records, small_run

IMAGES, CAPTIONS = [f"img{n}" for n in range(8)], [f"cap{n}" for n in range(20)]
PAIRS = [(f"img{i}", f"cap{c}") for i, c in [(0, 0), (0, 5), (0, 6), (1, 1), (2, 2), (2, 17), (3, 2), (5, 0), (5, 1), (5, 2), (5, 3)]]


def names(**more) -> Names:
    return Names(IMAGES, CAPTIONS, torch.arange(20) % 8, **more)


def written(folder: Path, form: str) -> str:
    path, rows = folder / f"pairs.{form}", [{"image": a, "caption": b} for a, b in PAIRS]
    match form:
        case "csv" | "tsv":
            cut = "," if form == "csv" else "\t"
            path.write_text("".join(f"{a}{cut}{b}\n" for a, b in [("image", "caption"), *PAIRS]))
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case "json":
            path.write_text(json.dumps(rows))
    return str(path)


def by_hand(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Of queries with positives: recalls in percent, mAP@R and R-precision, from each gallery in order of score."""
    found: dict[str, list[float]] = {"r1": [], "r5": [], "r10": [], "map_at_r": [], "r_precision": []}
    for row, positives in zip(scores, truth, strict=True):
        if not positives.any():
            continue
        hits = positives[np.argsort(-row)]
        for k in (1, 5, 10):
            found[f"r{k}"].append(100 * hits[:k].any())
        total = positives.sum()
        top = hits[:total]
        found["r_precision"].append(top.mean())
        found["map_at_r"].append(sum(top[: r + 1].mean() for r in range(total) if top[r]) / total)
    return {name: float(np.mean(values)) for name, values in found.items()}


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet", "json"])
def test_metrics_over_a_table_equal_a_loop_over_sorted_galleries(tmp_path, form):
    scores = torch.randn(8, 20, generator=torch.Generator().manual_seed(5))
    outcome = run_protocol("positives", Scored(scores, names()), options={"table": written(tmp_path, form)})
    truth = np.array([[(i, c) in PAIRS for c in CAPTIONS] for i in IMAGES])
    for way, values, held in (("i2t", scores.numpy(), truth), ("t2i", scores.numpy().T, truth.T)):
        for name, want in by_hand(values, held).items():
            assert outcome.metrics[f"{way}_{name}"] == pytest.approx(want), name
    six = [outcome.metrics[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)]
    assert outcome.metrics["rsum"] == pytest.approx(sum(six))
    assert outcome.counts == {"i2t_queries": 5, "t2i_queries": 7, "pairs": 11}


def test_a_mapping_and_a_list_of_two_are_tables_too(tmp_path):
    held = {image: [b for a, b in PAIRS if a == image] for image in dict(PAIRS)}
    (tmp_path / "map.json").write_text(json.dumps(held))
    (tmp_path / "two.json").write_text(json.dumps(PAIRS))
    assert [pair[:2] for pair in read_table(str(tmp_path / "map.json"))] == PAIRS
    assert [pair[:2] for pair in read_table(str(tmp_path / "two.json"))] == PAIRS


def test_images_are_named_by_key_image_id_or_file_name_and_columns_by_any_name(tmp_path):
    metas = [{"image_id": 100 + n, "filename": f"photos/{n}.jpg"} for n in range(8)]
    path = tmp_path / "pairs.csv"
    path.write_text("photo,text\nimg0,cap0\n101,cap1\nphotos/2.jpg,cap2\n")
    world = Scored(torch.eye(8, 20), names(image_metas=metas))
    outcome = run_protocol("positives", world, options={"table": str(path), "columns": ["photo", "text"]})
    assert (outcome.metrics["i2t_r1"], outcome.metrics["t2i_r1"]) == (100, 100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "image,caption\nimg0,cap0\nimg9,cap0\nimg0,cap99\n",
            r"2 of 3 pairs name what the split has not; .*line 3: no image 'img9'; .*line 4: no c",
        ),
        ("image,caption\nimg0,\n", r"p\.csv line 2: image and caption name a pair; it has"),
        ("photo,caption\nimg0,cap0\n", r"line 2 has no column image and caption \(set `columns`\); it has photo, caption"),
        ("image,caption\n", r"p\.csv holds no pair"),
        ("image,caption\ntwin,cap0\n", r"line 2: 'twin' is the name of 2 images of the split; name them by their keys"),
    ],
)
def test_a_table_that_does_not_fit_the_split_is_refused_with_counts_and_lines(tmp_path, text, message):
    (tmp_path / "p.csv").write_text(text)
    metas = [{"image_id": "twin" if n > 5 else n} for n in range(8)]
    with pytest.raises(ValueError, match=message):
        run_protocol("positives", Scored(torch.eye(8, 20), names(image_metas=metas)), options={"table": str(tmp_path / "p.csv")})


def test_a_protocol_refuses_options_that_it_has_not_and_names_the_one_it_lacks(tmp_path):
    with pytest.raises(ValueError, match="protocol 'auto' has no option 'table'"):
        run_protocol("auto", Scored(torch.eye(8, 20), names()), options={"table": "x"})
    with pytest.raises(ValueError, match="protocol 'positives': missing a required argument: 'table'"):
        run_protocol("positives", Scored(torch.eye(8, 20), names()))


def test_one_line_of_a_recipe_makes_a_set_of_ones_own_and_another_table_is_another_result(tmp_path):
    rows = records(12)
    table = tmp_path / "mine.csv"
    held = [(row.key, caption.id) for row in rows for caption in row.captions]
    table.write_text("image,caption\n" + "".join(f"{a},{b}\n" for a, b in held))
    recipe = small_run(tmp_path, evaluation={"protocol": "positives", "options": {"positives": {"table": str(table)}}})
    (tmp_path / "r.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    assert stage_main("evaluate", ["-c", str(tmp_path / "r.yaml")]) == 0
    path = Path(recipe.folder, "evaluation.json")
    first = json.loads(path.read_text())
    assert stage_main("evaluate", ["-c", str(tmp_path / "r.yaml"), "--protocol", "auto"]) == 0
    plain = json.loads(Path(recipe.folder, "evaluation-auto.json").read_text())
    assert [first["metrics"][f"i2t_r{k}"] for k in (1, 5, 10)] == [plain["metrics"][f"i2t_r{k}"] for k in (1, 5, 10)]
    table.write_text("image,caption\n" + "".join(f"{a},{b}\n" for a, b in held[::2]))
    assert stage_main("evaluate", ["-c", str(tmp_path / "r.yaml")]) == 0
    second = json.loads(path.read_text())
    assert (first["counts"]["pairs"], second["counts"]["pairs"]) == (len(held), len(held[::2]))


def test_a_score_file_takes_a_table_by_its_flag(tmp_path, capsys):
    np.save(tmp_path / "s.npy", np.eye(8, 20, dtype=np.float32))
    owners = [IMAGES[n % 8] for n in range(20)]
    (tmp_path / "t.json").write_text(json.dumps({"image_ids": IMAGES, "caption_ids": CAPTIONS, "caption_image_ids": owners}))
    scores = ["--scores", str(tmp_path / "s.npy"), "--truth", str(tmp_path / "t.json")]
    assert stage_main("evaluate", [*scores, "--table", written(tmp_path, "csv")]) == 0
    assert "the pairs of pairs.csv as positives" in capsys.readouterr().out
    assert stage_main("evaluate", [*scores, "--table", "x.csv", "--protocol", "auto"]) == 2
    assert "--table is the pairs of --protocol positives" in capsys.readouterr().err
