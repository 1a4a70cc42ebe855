"""What CUSA trains for images alone and captions alone is kept with the matcher, and every use of the run goes through it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import itm
from itm.config import Part, Recipe
from itm.data import files
from itm.data.shards import Sample, read_samples
from itm.evaluation.dataset import encode_split, names_of
from itm.evaluation.protocols import Question, Scored, run_protocol, same_label_metrics
from itm.evaluation.scoring import encode_rows
from itm.evaluation.sentence_pairs import STS
from itm.matchers.uni_heads import give_heads
from itm.types import Images
from pipelines.evaluate import evaluate
from pipelines.search import search
from pipelines.train import train
from tests.support.noise_split import small_split
from tests.support.small_training import recipe, splits, teach_noise

pytest_plugins = ["tests.support.registry_fixtures"]
pytestmark = pytest.mark.e2e
TOWERS = {"image": {"in_width": 3, "width": 8}, "text": {"word_dim": 6, "width": 8}}
SAF = Part(kind="saf", options={**TOWERS, "sim_dim": 6, "regions": 3})
METHOD = {"kind": "cusa", "options": {"triplet": {"reduction": "mean"}, "usa": {"weight": 20.0, "teacher": 0.1}}}


@pytest.fixture
def run(tmp_path: Path, registry: Path) -> Recipe:
    """SAF with CUSA on noise regions, whichever of its validations was the best."""
    splits(tmp_path, regions=True)
    small_split(tmp_path / "shards", "val", shards=1, regions=True)
    small_split(tmp_path / "shards", "test", shards=1, regions=True)
    data = {"image": "regions", "max_regions": 3}
    chosen = recipe(tmp_path, METHOD, teachers=teach_noise(tmp_path, regions=True), data=data, lr=0.01)
    chosen = chosen.model_copy(update={"model": SAF})
    train(chosen)
    return chosen


def by_hand(run: Recipe, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of the test split: through the kept heads, as plain tensors; and the mean of the parts. Then the image of each row."""
    folder = Path(run.folder)
    best = json.loads((folder / "run.json").read_text())["best"]["step"]
    weights = load_file(folder / "checkpoints" / f"best-{best:09d}.safetensors")
    matcher = itm.load_matcher(folder / "matcher")
    give_heads(matcher, None)
    split = encode_split(matcher, files.join(run.data.root, "test"))
    rows, reads = (split.images, matcher.v_global_w) if side == "image" else (split.captions, matcher.t_global_w)
    with torch.no_grad():
        vectors = reads(rows.parts, rows.mask) @ weights[f"uni_heads.{side}.weight"].T + weights[f"uni_heads.{side}.bias"]
    return vectors / vectors.norm(dim=1, keepdim=True), rows.vector, split.names.caption_image


def test_the_kept_heads_are_those_of_the_best_validation_and_serve_t2t_sts_and_search(run: Recipe, tmp_path: Path) -> None:
    heads, means, image = by_hand(run, "text")
    found = evaluate(run, protocol="t2t")
    wanted = same_label_metrics(heads, image)
    assert found["metrics"]["t2t_map_at_r"] == pytest.approx(wanted["map_at_r"])
    assert found["metrics"]["t2t_map_at_r"] != pytest.approx(same_label_metrics(means, image)["map_at_r"])
    matcher = itm.load_matcher(f"{run.folder}/matcher")
    pairs = tmp_path / "pairs.tsv"
    sentences = ["a red thing number red", "a blue thing number white", "a green thing", "a thing", "number black"]
    pairs.write_text("\n".join(["sentence1\tsentence2\tscore", *(f"{s}\t{sentences[0]}\t{n}" for n, s in enumerate(sentences))]))
    through = STS().measure(matcher, Question(pairs=[str(pairs)])).metrics["sts_pairs"]
    give_heads(matcher, None)
    assert through != STS().measure(matcher, Question(pairs=[str(pairs)])).metrics["sts_pairs"]
    shards = files.join(run.data.root, "test")
    split = encode_split(matcher, shards)
    asked = split.names.texts[4]
    hits = search(asked, model=f"{run.folder}/matcher", shards=shards, find="captions", k=len(heads)).hits
    cosines = heads @ heads[4]
    assert [h.score for h in hits] == pytest.approx(sorted(cosines.tolist(), reverse=True), abs=1e-5)
    assert hits[0].captions == [asked]


def test_image_to_image_search_of_a_late_matcher_goes_through_its_heads(run: Recipe, tmp_path: Path) -> None:
    heads, means, _ = by_hand(run, "image")
    shards = files.join(run.data.root, "test")
    query = tmp_path / "query.npz"
    samples = [s for s in read_samples(f"{shards}/00000.tar") if isinstance(s, Sample)]
    query.write_bytes(samples[3].regions or b"")
    hits = search(image=str(query), model=f"{run.folder}/matcher", shards=shards, find="images", k=len(heads)).hits
    found = {h.key: h.score for h in hits}
    assert [found[s.key] for s in samples] == pytest.approx((heads @ heads[3]).tolist(), abs=1e-5)
    assert found != pytest.approx(dict(zip(found, (means @ means[3]).tolist(), strict=True)), abs=1e-3)


def test_the_protocol_i2i_of_a_late_matcher_goes_through_its_heads(run: Recipe) -> None:
    weights, matcher = load_file(f"{run.folder}/matcher/model.safetensors"), itm.load_matcher(f"{run.folder}/matcher")
    labels = torch.arange(24) % 3
    regions = torch.randn(24, 3, 3) + labels[:, None, None]
    images = encode_rows(matcher, Images(torch.arange(24), regions=regions, mask=torch.ones(24, 3, dtype=torch.bool)))
    with torch.no_grad():
        heads = matcher.v_global_w(images.parts, images.mask) @ weights["uni_heads.image.weight"].T + weights["uni_heads.image.bias"]
    names = replace(names_of(24, torch.arange(24)), image_metas=[{"label": f"sort {k}"} for k in labels.tolist()])
    found = run_protocol("i2i", Scored(torch.zeros(24, 24), names, images=images)).metrics
    assert found["i2i_map_at_r"] == pytest.approx(same_label_metrics(heads, labels)["map_at_r"])
    assert found["i2i_map_at_r"] != pytest.approx(same_label_metrics(images.vector, labels)["map_at_r"])


def test_a_best_matcher_that_an_earlier_version_kept_without_heads_still_ends_the_run(run: Recipe) -> None:
    folder = Path(run.folder)
    best = next((folder / "checkpoints").glob("best-*.safetensors"))
    save_file({name: value for name, value in load_file(best).items() if not name.startswith("uni_heads.")}, best)
    (folder / "run.json").unlink()
    train(run)
    assert itm.load_matcher(folder / "matcher").uni_heads is None
