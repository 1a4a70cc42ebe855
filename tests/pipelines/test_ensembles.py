"""An ensemble is one model: its mean folder evaluates, registers, loads, searches and serves with the numbers of its members' scores."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import itm
from itm.config import Part, Recipe
from itm.data import files
from itm.data.preprocess import ImageInput, Inputs
from itm.data.shards import Sample, read_samples
from itm.evaluation.dataset import encode_split
from itm.evaluation.scoring import score_matrix
from itm.matchers.folder import build_matcher, save_matcher
from itm.matchers.mean import Mean
from itm.matchers.weights import weights_hash
from itm.tracking.registry import find_version
from pipelines.cli import stage_main
from pipelines.evaluate import evaluate
from pipelines.explain import explain
from pipelines.on_ray.options import How
from pipelines.register import register
from pipelines.report import report
from pipelines.search import search
from tests.support.small_split import small_run

pytest_plugins = ["tests.support.registry_fixtures"]
SCAN = Part(kind="scan", options={"image": {"kind": "conv", "image_size": 64, "hidden": 8}, "text": {"kind": "gru", "width": 16}})


def ensemble(root: Path) -> tuple[Recipe, list[str]]:
    """A recipe of two members in folders of their own: a dual encoder, and a late interaction of the same captions."""
    recipe = small_run(root)
    first, second = f"{root}/members/one/matcher", f"{root}/members/two/matcher"
    shutil.move(f"{recipe.folder}/matcher", first)
    inputs = itm.load_matcher(first).inputs
    torch.manual_seed(5)
    save_matcher(build_matcher(SCAN, inputs), second)
    for uri, manifest in ((first, "m1"), (second, "m2")):
        said = {"format": 1, "run_id": manifest, "manifest": manifest, "teachers": {}}
        (Path(uri).parent / "run.json").write_text(json.dumps(said))
    members = recipe.evaluation.model_copy(update={"ensemble": [first, second]})
    registry = recipe.registry.model_copy(update={"model": "together"})
    return recipe.model_copy(update={"evaluation": members, "registry": registry}), [first, second]


def by_hand(recipe: Recipe, members: list[str]) -> torch.Tensor:
    """(I,T) the mean of the members' score matrices, each with its own encoding of the split."""
    scores = []
    for uri in members:
        matcher = itm.load_matcher(uri)
        split = encode_split(matcher, files.join(recipe.data.root, "test"))
        scores.append(score_matrix(matcher, split.images, split.captions))
    return sum(scores) / len(scores)


def test_a_mean_folder_is_evaluated_and_searched_as_the_ensemble_of_its_members(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, members = ensemble(tmp_path)
    shards, wanted = files.join(recipe.data.root, "test"), by_hand(recipe, members)
    together = evaluate(recipe)
    folder = str(tmp_path / "mean")
    save_matcher(Mean.of([itm.load_matcher(uri) for uri in members]), folder)
    shutil.rmtree(tmp_path / "members")
    alone = evaluate(recipe, folder, save_scores=str(tmp_path / "scores.npy"))
    assert alone["metrics"] == together["metrics"]
    assert alone["matcher_hash"] == together["matcher_hash"]
    np.testing.assert_array_equal(np.load(tmp_path / "scores.npy"), wanted.numpy())
    assert stage_main("evaluate", ["--model", folder, "--shards", shards, "--output", str(tmp_path / "page.json")]) == 0
    said = json.loads((tmp_path / "page.json").read_text())
    assert said["models"][0]["metrics"] == together["metrics"]
    assert evaluate(recipe, folder, how=How(screen="1000"))["metrics"] == together["metrics"], "a screen that keeps all is exact"
    text = encode_split(itm.load_matcher(folder), shards).names.texts[3]
    for _ in range(2):  # the second time from the indices of the members
        hits = search(text, model=folder, shards=shards, k=12).hits
        assert [h.score for h in hits] == pytest.approx(sorted(wanted[:, 3].tolist(), reverse=True), abs=1e-6)
    assert search(text, model=folder, shards=shards, find="captions", k=1).hits[0].captions == [text]
    assert len(list((Path(shards) / "index").iterdir())) == 2


def test_the_screen_of_an_ensemble_proposes_by_the_mean_cosine_and_scores_exactly(tmp_path: Path) -> None:
    recipe, members = ensemble(tmp_path)
    cosines = torch.zeros(())
    for uri in members:
        split = encode_split(itm.load_matcher(uri), files.join(recipe.data.root, "test"))
        unit = [v / v.norm(dim=1, keepdim=True) for v in (split.images.vector, split.captions.vector)]
        cosines = cosines + unit[0] @ unit[1].T / 2
    proposed = torch.zeros(cosines.shape, dtype=torch.bool)
    proposed.scatter_(1, cosines.topk(2, dim=1).indices, True)
    proposed.scatter_(0, cosines.topk(2, dim=0).indices, True)
    result = evaluate(recipe, how=How(screen="2"), save_scores=str(tmp_path / "s.npy"))
    scores, wanted = torch.from_numpy(np.load(tmp_path / "s.npy")), by_hand(recipe, members)
    assert result["screen"]["scored"] == pytest.approx(proposed.float().mean().item())
    torch.testing.assert_close(scores[proposed], wanted[proposed])
    assert scores[~proposed].max() < scores[proposed].min()


def test_sentences_are_compared_by_the_mean_cosine_of_the_members(tmp_path: Path) -> None:
    _, members = ensemble(tmp_path)
    sentences = ["a red circle", "a red square", "a blue circle above a square", "a green star", "a circle"]
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("\n".join(["sentence1\tsentence2\tscore", *(f"{s}\t{sentences[0]}\t{n}" for n, s in enumerate(sentences))]))
    cosines = torch.zeros(len(sentences))
    for uri in members:
        matcher = itm.load_matcher(uri)
        with torch.no_grad():
            vectors = matcher.encode_captions(matcher.inputs.captions(sentences)).vector
        cosines += torch.cosine_similarity(vectors, vectors[:1]) / 2
    order = cosines.argsort().argsort().double()
    asked = ["--protocol", "sts", "--pairs", str(pairs), "--matcher", members[0], "--matcher", members[1]]
    assert stage_main("evaluate", asked) == 0
    result = json.loads(Path(f"{pairs}.evaluation.json").read_text())
    assert result["metrics"]["sts_pairs"] == pytest.approx(100 * np.corrcoef(order, np.arange(len(sentences)))[0, 1])
    assert result["matcher"] == " + ".join(members)


def test_a_mean_is_explained_by_its_members(tmp_path: Path) -> None:
    recipe, members = ensemble(tmp_path)
    save_matcher(Mean.of([itm.load_matcher(uri) for uri in members]), tmp_path / "mean")
    shards = files.join(recipe.data.root, "test")
    key = next(s.key for s in read_samples(f"{shards}/00000.tar") if isinstance(s, Sample))
    told, _ = explain([str(tmp_path / "mean")], shards, key)
    alone, _ = explain(members, shards, key)
    assert [said["kind"] for said in told["models"].values()] == ["dual", "scan"]
    assert [said["score"] for said in told["models"].values()] == [said["score"] for said in alone["models"].values()]


def test_an_ensemble_of_members_that_read_other_data_is_refused_by_their_names(tmp_path: Path) -> None:
    recipe, members = ensemble(tmp_path)
    inputs = itm.load_matcher(members[0]).inputs
    regions = Part(kind="scan", options={"image": {"in_width": 3, "width": 16}, "text": {"width": 16}})
    save_matcher(build_matcher(regions, Inputs(ImageInput("regions", max_regions=3), inputs.tokenizer)), members[1])
    with pytest.raises(ValueError, match=r"one/matcher and .*two/matcher read other data.*the first reads pixels, the second regions"):
        evaluate(recipe)


@pytest.mark.e2e
def test_an_ensemble_recipe_is_registered_with_its_members_inside_and_serves_as_one(registry: Path, tmp_path: Path) -> None:
    recipe, members = ensemble(tmp_path)
    shards, wanted = files.join(recipe.data.root, "test"), by_hand(recipe, members)
    with pytest.raises(ValueError, match=r"no .*evaluation\.json; run `itm evaluate`"):
        register(recipe)
    measured = evaluate(recipe)
    done = register(recipe)
    assert (done.uri, done.champion, register(recipe).version) == ("models:/together/1", True, "1")
    version = find_version("models:/together@champion")
    assert version.tags["train_data"] == "m1 + m2"
    assert float(version.tags["rsum"]) == pytest.approx(measured["metrics"]["rsum"])
    assert f"the mean of the scores of {members[0]}, {members[1]}" in version.description
    assert "mean of" in Path(report(recipe)).read_text()
    shutil.rmtree(tmp_path / "members")
    loaded = itm.load_matcher("models:/together@champion")
    assert weights_hash(loaded) == measured["matcher_hash"]
    assert evaluate(recipe, "models:/together@champion")["metrics"] == measured["metrics"]
    hits = search("a red circle", model="models:/together/1", shards=shards, k=3).hits
    assert len(hits) == 3
    with warnings.catch_warnings(action="ignore"):
        import mlflow.pyfunc

        served = mlflow.pyfunc.load_model("models:/together/1")
    samples = [s for n in range(2) for s in read_samples(f"{shards}/0000{n}.tar") if isinstance(s, Sample)]
    texts = [caption.text for s in samples for caption in s.captions]
    rows = [{"image": s.image} for s in samples] + [{"text": text} for text in texts]
    np.testing.assert_allclose(served.predict(rows, params={"output": "scores"}), wanted.numpy(), atol=1e-5)
    alike = served.predict(texts[:4], params={"output": "t2t"})
    vectors = loaded.encode_captions(loaded.inputs.captions(texts[:4])).vector
    np.testing.assert_allclose(alike, (vectors @ vectors.T).detach().numpy(), atol=1e-5)


@pytest.mark.e2e
def test_an_ensemble_whose_members_were_trained_on_is_evaluated_again_before_it_is_registered(registry: Path, tmp_path: Path) -> None:
    recipe, members = ensemble(tmp_path)
    evaluate(recipe)
    torch.manual_seed(9)
    save_matcher(build_matcher(SCAN, itm.load_matcher(members[0]).inputs), members[1])
    with pytest.raises(ValueError, match="measured on other weights than .*run `itm evaluate` again"):
        register(recipe)
    evaluate(recipe)
    assert register(recipe).version == "1"
