import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from itm.config import parse_recipe
from itm.data.preprocess import ImageInput, Inputs
from itm.data.records import Caption, Record, Regions
from itm.data.text import WordVocabulary
from itm.evaluation.relations import isd_of_split
from itm.losses.relation import isd, isda
from itm.matchers.folder import build_matcher, save_matcher
from pipelines.cli import stage_main
from tests.support.every_matcher import REGIONS, matcher_of
from tests.support.small_split import write_split

TEXTS = ["red dog near cat", "small dog", "blue cat under box", "large box on red cat"]


def records(entities=None) -> list[Record]:
    """Six images of four regions, two captions each; image 1 has one region only."""
    rng = np.random.default_rng(0)
    rows = []
    for n in range(6):
        size = 1 if n == 1 else REGIONS
        boxes = np.array([[0, 0, 20, 20]] * size, np.float32)
        meta = {} if entities is None else {"entities": entities(n)}
        captions = [Caption(f"{n}-{k}", TEXTS[(n + k) % len(TEXTS)], meta) for k in range(2)]
        rows.append(Record(f"im{n}", "test", captions, regions=Regions(rng.normal(size=(size, 6)).astype(np.float16), boxes, 40, 40)))
    return rows


def world(folder: Path, kind: str, entities=None):
    """(matcher, split) on disk."""
    torch.manual_seed(0)
    matcher = matcher_of(kind)
    matcher.inputs = Inputs(ImageInput(kind="regions", max_regions=REGIONS), WordVocabulary.from_captions(TEXTS * 2, min_count=1))
    write_split(folder / "shards" / "test", records(entities))
    return matcher, str(folder / "shards" / "test")


def relations_of(matcher, row: Record, caption: Caption):
    with torch.no_grad():
        return matcher.relations(matcher.inputs.images([row.regions.to_npz()]), matcher.inputs.captions([caption.text]))[2]


@pytest.mark.parametrize("kind", ["uniter", "scan", "saf"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_isd_is_the_mean_over_matched_pairs_taken_one_by_one(tmp_path, kind, batch_size):
    matcher, split = world(tmp_path, kind)
    outcome = isd_of_split(matcher, split, annotated=False, batch_size=batch_size)
    alone = []
    for row in records():
        for caption in row.captions:
            r = relations_of(matcher, row, caption)
            alone.append({name: float(v) for name, v in isd(r.blocks, r.word_mask, r.region_mask).items()})
    assert outcome.metrics == pytest.approx({f"isd_{name}": np.mean([a[name] for a in alone]) for name in alone[0]}, rel=1e-4, abs=1e-6)
    assert outcome.counts == {"pairs": 12, "left_out": 0, "rejected": 0}


def test_isda_compares_annotated_entities_and_leaves_captions_with_fewer_than_two_out(tmp_path):
    def entities(n):
        return [{"words": [0], "regions": [0, 2]}, {"words": [1], "regions": [1]}][: 1 if n == 1 else 2]

    matcher, split = world(tmp_path, "uniter", entities)
    outcome = isd_of_split(matcher, split, annotated=True, batch_size=4)
    alone = []
    for row in records(entities):
        for caption in row.captions:
            if row.key != "im1":
                r = relations_of(matcher, row, caption)
                words, regions = torch.zeros(1, 2, r.word_mask.shape[1]), torch.zeros(1, 2, r.region_mask.shape[1])
                words[0, 0, 0] = words[0, 1, 1] = regions[0, 0, 0] = regions[0, 0, 2] = regions[0, 1, 1] = 1
                alone.append(isda(r.blocks[0], r.blocks[1], words, regions))
    assert outcome.counts == {"pairs": 10, "left_out": 2, "rejected": 0}
    want = {"isda_sum": np.mean([float(a.sum) for a in alone]), "isda_mean": np.mean([float(a.mean) for a in alone])}
    assert outcome.metrics == pytest.approx(want, rel=1e-4)


def test_isda_without_annotation_or_with_positions_outside_the_pair_is_refused(tmp_path):
    matcher, split = world(tmp_path, "uniter")
    with pytest.raises(ValueError, match="no matched pair of 12 names two entities in its metadata `entities`"):
        isd_of_split(matcher, split, annotated=True)
    matcher, split = world(tmp_path, "uniter", lambda n: [{"words": [0], "regions": [0]}, {"words": [9], "regions": [0]}])
    with pytest.raises(ValueError, match=r"caption 0-0: entity 1 names words \[9\], the pair has 4 words"):
        isd_of_split(matcher, split, annotated=True)


def test_spans_of_characters_are_the_words_of_the_tokenizer_and_what_is_without_a_region_is_left_out(tmp_path):
    def spans(n, k):
        text = TEXTS[(n + k) % len(TEXTS)]
        first, last = text.split()[0], text.split()[-1]
        edges = [[0, len(first)], [len(text) - len(last), len(text)]]
        return [
            {"spans": [edges[0]], "regions": [0]},
            {"spans": [edges[1]], "regions": [1, 99]},
            {"spans": [[0, len(text)]], "regions": []},
        ]

    matcher, split = world(tmp_path, "uniter")
    write_split(Path(split), [said(row, spans) for row in records()])
    got = isd_of_split(matcher, split, annotated=True, batch_size=4)
    write_split(Path(split), [said(row, lambda n, k: words_of(TEXTS[(n + k) % len(TEXTS)])) for row in records() if row.key != "im1"])
    want = isd_of_split(matcher, split, annotated=True, batch_size=4)
    assert got.metrics == pytest.approx(want.metrics, rel=1e-5)
    # Image 1 has one region: of its two captions the second entity falls away as well, and with it the caption.
    assert got.counts == {"pairs": 10, "left_out": 2, "rejected": 0, "entities_left_out": 14}
    assert matcher.inputs.tokenizer.truncated == 0


def said(row: Record, entities) -> Record:
    n = int(row.key[2:])
    return replace(row, captions=[replace(c, meta={"entities": entities(n, k)}) for k, c in enumerate(row.captions)])


def words_of(text: str) -> list[dict]:
    return [{"words": [0], "regions": [0]}, {"words": [len(text.split()) - 1], "regions": [1]}]


def test_a_broken_region_file_is_counted_and_left_out(tmp_path):
    matcher, split = world(tmp_path, "scan")
    rows = records()
    rows[3] = replace(rows[3], regions=Regions(np.full((2, 6), np.inf, np.float16), np.zeros((2, 4), np.float32), 40, 40))
    write_split(tmp_path / "shards" / "test", rows)
    assert isd_of_split(matcher, split, annotated=False).counts == {"pairs": 10, "left_out": 0, "rejected": 1}


def test_a_matcher_with_one_vector_a_side_is_refused_before_the_split_is_read(tmp_path):
    matcher, split = world(tmp_path, "dual")
    with pytest.raises(ValueError, match="IAIS relates words and image parts in one space"):
        isd_of_split(matcher, split, annotated=False)


def test_the_command_writes_the_four_values_with_hashes(tmp_path, capsys):
    matcher, _ = world(tmp_path, "uniter")
    model = {"kind": "uniter", "options": matcher.options}
    recipe = parse_recipe({"name": "u", "output": str(tmp_path / "runs"), "data": {"root": str(tmp_path / "shards")}, "model": model})
    save_matcher(build_matcher(recipe.model, matcher.inputs), f"{recipe.folder}/matcher")
    (tmp_path / "u.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    assert stage_main("evaluate", ["-c", str(tmp_path / "u.yaml"), "--protocol", "isd"]) == 0
    result = json.loads(Path(recipe.folder, "evaluation-isd.json").read_text())
    assert set(result["metrics"]) == {f"isd_{a}_{k}" for a in "LV" for k in ("singular", "distributed")}
    assert len(result["matcher_hash"]) == len(result["split_hash"]) == 12
    assert f"{result['metrics']['isd_L_singular']:.4f}" in capsys.readouterr().out
