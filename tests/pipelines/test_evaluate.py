import contextlib
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import itm
from itm.data.shards import read_manifest
from itm.evaluation import tiles
from itm.evaluation.dataset import EncodedSplit, Names, encode_split, exact_relevance
from itm.evaluation.metrics import retrieval_metrics
from itm.evaluation.protocols import Coco1KFolds
from itm.evaluation.scoring import score_matrix
from itm.matchers.folder import build_matcher, save_matcher
from itm.matchers.weights import weights_hash
from itm.types import Encoded
from pipelines.cli import stage_main
from pipelines.evaluate import evaluate_scores
from pipelines.evaluating import driver as evaluate
from pipelines.on_ray import scoring
from pipelines.on_ray.options import How
from tests.support.ports import free_ports
from tests.support.small_split import records, small_run, write_split


def test_a_split_is_encoded_in_tar_order_with_ids_texts_and_metadata(tmp_path):
    recipe, rows = small_run(tmp_path), records(12)
    split = encode_split(itm.load_matcher(f"{recipe.folder}/matcher"), f"{recipe.data.root}/test", batch_size=5)
    captions = [(row_number, c) for row_number, row in enumerate(rows) for c in row.captions]
    assert split.names.image_keys == [row.key for row in rows]
    assert split.names.caption_ids == [c.id for _, c in captions]
    assert split.names.texts == [c.text for _, c in captions]
    assert split.names.caption_image.tolist() == [row_number for row_number, _ in captions]
    assert (len(split.images), len(split.captions)) == (12, len(captions))
    assert split.problems == []


def test_batch_size_and_limit_change_which_rows_are_encoded_but_not_their_vectors(tmp_path):
    recipe = small_run(tmp_path)
    matcher, uri = itm.load_matcher(f"{recipe.folder}/matcher"), f"{recipe.data.root}/test"
    whole, part = encode_split(matcher, uri, batch_size=64), encode_split(matcher, uri, batch_size=3, limit=8)
    assert part.names.image_keys == whole.names.image_keys[:8]
    assert torch.allclose(part.images.vector, whole.images.vector[:8], atol=1e-6)
    assert torch.allclose(part.captions.vector, whole.captions.vector[: len(part.captions)], atol=1e-6)


def test_the_result_equals_metrics_computed_by_hand_from_the_same_shards(tmp_path):
    recipe = small_run(tmp_path)
    result = evaluate.evaluate(recipe)
    matcher, uri = itm.load_matcher(f"{recipe.folder}/matcher"), f"{recipe.data.root}/test"
    split = encode_split(matcher, uri)
    relevance = exact_relevance("scenes", split.names)
    assert result["metrics"] == retrieval_metrics(score_matrix(matcher, split.images, split.captions), split.positives, relevance)
    assert result["split_hash"] == read_manifest(uri).fingerprint()
    assert json.loads(Path(recipe.folder, "evaluation.json").read_text()) == json.loads(json.dumps(result))


def test_evaluating_again_recomputes_nothing_until_the_weights_or_the_protocol_change(tmp_path, monkeypatch):
    recipe = small_run(tmp_path)
    first = evaluate.evaluate(recipe)
    monkeypatch.setattr(evaluate, "encode", lambda *_: pytest.fail("was computed again"))
    assert evaluate.evaluate(recipe) == json.loads(json.dumps(first))
    with pytest.raises(pytest.fail.Exception):
        evaluate.evaluate(recipe, tie="optimistic")


def test_the_exact_relevance_of_scenes_holds_for_every_annotated_pair_and_is_unknown_elsewhere(tmp_path):
    recipe = small_run(tmp_path, count=40)
    names = encode_split(itm.load_matcher(f"{recipe.folder}/matcher"), f"{recipe.data.root}/test").names
    relevance = exact_relevance("scenes 0123", names)
    annotated = names.caption_image == torch.arange(len(names.image_keys))[:, None]
    assert (relevance | ~annotated).all()
    assert relevance.sum() > annotated.sum()
    assert exact_relevance("foreign shards", names) is None
    assert exact_relevance("csv 0123", names) is None


def test_a_corrupt_image_is_quarantined_counted_and_its_captions_left_out(tmp_path):
    recipe, rows = small_run(tmp_path, data={"root": str(tmp_path / "shards"), "max_reject_rate": 0.2}), records(12)
    rows[4] = replace(rows[4], image=b"\x89PNG not an image")
    write_split(tmp_path / "shards" / "test", rows)
    result = evaluate.evaluate(recipe)
    assert result["rejected"] == 1
    assert result["counts"]["images"] == 11
    row = json.loads(Path(recipe.folder, "evaluation.quarantine.jsonl").read_text())
    assert (row["key"], row["shard"], row["stage"]) == (rows[4].key, "00000.tar", "evaluate")
    assert "cannot decode image" in row["reason"]


def test_too_many_rejected_images_fail_the_stage_and_name_the_first(tmp_path):
    recipe, rows = small_run(tmp_path), records(12)
    rows[4] = replace(rows[4], image=b"nothing")
    write_split(tmp_path / "shards" / "test", rows)
    with pytest.raises(ValueError, match=rf"1 of 12 samples were rejected \(limit 1.0%\); the first is '{rows[4].key}' in 00000.tar"):
        evaluate.evaluate(recipe)
    assert not Path(recipe.folder, "evaluation.json").exists()


def change(shard):
    before = shard.read_bytes()
    shard.write_bytes(before.replace(b"captions", b"captiona", 1))
    assert shard.read_bytes() != before


def test_a_shard_that_changed_after_its_manifest_is_refused_although_it_has_its_size(tmp_path):
    recipe = small_run(tmp_path)
    change(tmp_path / "shards" / "test" / "00001.tar")
    with pytest.raises(ValueError, match=r"00001\.tar has sha256 \w+, its manifest says \w+: the shard changed after the manifest"):
        evaluate.evaluate(recipe)


def test_saved_scores_read_back_as_a_foreign_model_give_the_same_recalls(tmp_path):
    recipe = small_run(tmp_path)
    path = str(tmp_path / "scores.npy")
    own = evaluate.evaluate(recipe, save_scores=path)
    foreign = evaluate_scores(path, f"{path}.ids.json")
    for name in ("i2t_r1", "t2i_r5", "rsum", "i2t_medr"):
        assert foreign["metrics"][name] == own["metrics"][name]
    assert Path(tmp_path, "scores.evaluation.json").exists()


def write_truth(folder: Path, scores: np.ndarray, **changed) -> list[str]:
    truth = {"image_ids": ["a", "b"], "caption_ids": ["0", "1", "2"], "caption_image_ids": ["a", "b", "b"]} | changed
    np.save(folder / "s.npy", scores)
    (folder / "t.json").write_text(json.dumps({name: ids for name, ids in truth.items() if ids is not None}))
    return ["--scores", str(folder / "s.npy"), "--truth", str(folder / "t.json")]


@pytest.mark.parametrize(
    ("scores", "changed", "message"),
    [
        (np.zeros((2, 4)), {}, "scores have shape (2, 4), but the truth has 2 images x 3 captions"),
        (np.zeros(6), {}, "must hold a float matrix (images, captions), not float64 (6,)"),
        (np.zeros((2, 3), int), {}, "must hold a float matrix"),
        (np.full((2, 3), np.nan), {}, "6 of 6 scores are NaN, the first at image 'a', caption '0'"),
        (np.zeros((2, 3)), {"caption_image_ids": ["a", "b", "x"]}, "1 of 3 captions have no image, the first is '2'"),
        (np.zeros((2, 3)), {"caption_image_ids": ["a", "b"]}, "3 caption_ids but 2 caption_image_ids"),
        (np.zeros((2, 3)), {"image_ids": ["a", "a"]}, "1 image keys occur more than once, the first is 'a'"),
        (np.zeros((2, 3)), {"caption_ids": None}, "lacks 'caption_ids'"),
    ],
)
def test_a_bad_score_or_truth_file_is_one_line_and_exit_code_2(tmp_path, capsys, scores, changed, message):
    assert stage_main("evaluate", write_truth(tmp_path, scores, **changed)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s.evaluation.json").exists()


def test_the_table_of_a_score_file_shows_both_ways_with_chance(tmp_path, capsys):
    scores = np.array([[0.9, 0.1, 0.2], [0.3, 0.8, 0.7]])
    assert stage_main("evaluate", write_truth(tmp_path, scores)) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert lines["r1"][0] == "100.00"
    assert lines["rsum"][0] == "600.00"


def test_the_same_weights_have_the_same_hash_and_others_do_not(tmp_path):
    recipe = small_run(tmp_path)
    matcher = itm.load_matcher(f"{recipe.folder}/matcher")
    before = weights_hash(matcher)
    assert before == weights_hash(itm.load_matcher(f"{recipe.folder}/matcher"))
    with torch.no_grad():
        next(matcher.parameters()).view(-1)[0] += 1e-3
    assert weights_hash(matcher) != before


@pytest.mark.e2e
def test_encoding_by_ray_tasks_gives_the_vectors_of_one_process(tmp_path, ray_local, monkeypatch):
    recipe = small_run(tmp_path)
    matcher, uri = itm.load_matcher(f"{recipe.folder}/matcher"), f"{recipe.data.root}/test"
    manifest = read_manifest(uri)
    alone = evaluate.encode(matcher, uri, manifest, recipe)
    monkeypatch.setattr(evaluate, "IN_PROCESS_CAPTIONS", 0)
    spread = evaluate.encode(matcher, uri, manifest, recipe)
    assert spread.names.image_keys == alone.names.image_keys
    assert torch.equal(spread.images.vector, alone.images.vector)
    assert torch.equal(spread.captions.vector, alone.captions.vector)
    change(tmp_path / "shards" / "test" / "00001.tar")
    with pytest.raises(ValueError, match=r"^\S*00001\.tar has sha256"):
        evaluate.encode(matcher, uri, manifest, recipe)


@pytest.mark.e2e
def test_metrics_and_the_file_reach_the_run_of_the_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    from itm.tracking.runs import Tracker, client

    recipe = small_run(tmp_path)
    with Tracker.start("test", "small") as tracker:
        Path(recipe.folder, "run.json").write_text(json.dumps({"run_id": tracker.run_id}))
    result = evaluate.evaluate(recipe)
    run = client().get_run(tracker.run_id)
    assert run.data.metrics["test/auto/rsum"] == pytest.approx(result["metrics"]["rsum"])
    assert [f.path for f in client().list_artifacts(tracker.run_id)] == ["environment.json", "evaluation.json", "log"]
    texts = evaluate.evaluate(recipe, protocol="t2t")
    metrics = client().get_run(tracker.run_id).data.metrics
    assert {name: metrics[f"test/t2t/{name}"] for name in texts["metrics"]} == pytest.approx(texts["metrics"])
    assert {name: metrics[f"test/auto/{name}"] for name in result["metrics"]} == pytest.approx(result["metrics"])


@pytest.mark.e2e
def test_an_evaluation_that_finds_its_run_in_another_store_says_so_and_keeps_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/first/mlflow.db")
    from itm.tracking.runs import Tracker

    recipe = small_run(tmp_path)
    with Tracker.start("test", "small") as tracker:
        said = {"run_id": tracker.run_id, "tracking_uri": tracker.uri}
        Path(recipe.folder, "run.json").write_text(json.dumps(said))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/second.db")
    assert evaluate.evaluate(recipe)["metrics"]
    told = capsys.readouterr().err
    assert f"sqlite:///{tmp_path}/second.db; it was recorded in {tracker.uri}: export MLFLOW_TRACKING_URI={tracker.uri}" in told
    assert not (tmp_path / "second.db").exists()


@pytest.mark.e2e
def test_a_dead_server_is_told_before_the_evaluation(tmp_path, monkeypatch):
    [port] = free_ports(1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    recipe = small_run(tmp_path)
    Path(recipe.folder, "run.json").write_text(json.dumps({"run_id": "0" * 32}))
    with pytest.raises(ValueError, match=f"no answer from the tracking server at http://127.0.0.1:{port}"):
        evaluate.evaluate(recipe)
    assert not Path(recipe.folder, "evaluation.json").exists()


def test_an_ensemble_is_the_mean_of_its_members_scores_under_a_name_that_lists_them(tmp_path, capsys):
    recipe = small_run(tmp_path)
    first = f"{recipe.folder}/matcher"
    second = str(tmp_path / "runs" / "other" / "matcher")
    torch.manual_seed(5)
    save_matcher(build_matcher(recipe.model, itm.load_matcher(first).inputs), second)
    members, uri = [itm.load_matcher(first), itm.load_matcher(second)], f"{recipe.data.root}/test"
    splits = [encode_split(m, uri) for m in members]
    mean = sum(score_matrix(m, s.images, s.captions) for m, s in zip(members, splits, strict=True)) / 2
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe.model_dump(mode="json")))
    assert stage_main("evaluate", ["-c", str(path), "--matcher", first, "--matcher", second, "--save-scores", str(tmp_path / "s.npy")]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "s.npy"), mean.numpy(), atol=1e-6)
    (written,) = (path for path in Path(recipe.folder).glob("evaluation-small-other-*.json") if "queries" not in path.name)
    result = json.loads(written.read_text())
    relevance = exact_relevance("scenes", splits[0].names)
    assert result["metrics"] == pytest.approx(retrieval_metrics(mean, splits[0].positives, relevance))
    assert result["matcher_hash"] == "+".join(map(weights_hash, members))
    assert result["matcher"] == f"{first} + {second}"
    assert result["score_type"] == "mean of DualEncoder + DualEncoder scores, fp32"


def test_every_number_is_stored_with_protocol_ties_score_type_hashes_chance_and_counts(tmp_path):
    recipe = small_run(tmp_path)
    result = evaluate.evaluate(recipe, tie="official")
    assert {"protocol", "tie", "score_type", "precision", "split_hash", "matcher_hash", "counts", "rejected"} <= set(result)
    assert set(result["chance"]) == {name for name in result["metrics"] if not name.endswith("medr")}
    found = evaluate.evaluate(recipe, protocol="t2t")
    assert set(found["chance"]) == set(found["metrics"])
    assert Path(recipe.folder, "evaluation-t2t.json").exists()


def test_the_protocol_of_the_recipe_is_what_evaluation_json_holds(tmp_path):
    recipe = small_run(tmp_path)
    section = recipe.evaluation.model_copy(update={"protocol": "t2t"})
    evaluate.evaluate(recipe.model_copy(update={"evaluation": section}))
    assert json.loads(Path(recipe.folder, "evaluation.json").read_text())["protocol_name"] == "t2t"


def test_a_matcher_that_reads_other_images_cannot_join_an_ensemble(tmp_path):
    names = [Names(keys, [f"c{k}" for k in keys], torch.arange(len(keys))) for keys in (["a", "b", "c"], ["a", "c"])]
    seen = [EncodedSplit(Encoded(), Encoded(), n) for n in names]
    with pytest.raises(ValueError, match="only one of the matchers 1 and 2 can read 1 images, e.g. 'b'"):
        evaluate.agreed(seen, "split")


def test_captions_without_a_word_are_quarantined_and_counted_and_the_rest_is_scored(tmp_path):
    recipe, rows = small_run(tmp_path, data={"root": str(tmp_path / "shards"), "max_reject_rate": 0.5}), records(12)
    rows[2] = replace(rows[2], captions=[replace(c, text="...") if n == 1 else c for n, c in enumerate(rows[2].captions)])
    rows[5] = replace(rows[5], captions=[replace(c, text="!?") for c in rows[5].captions])
    write_split(tmp_path / "shards" / "test", rows)
    result = evaluate.evaluate(recipe)
    assert (result["rows_in"], result["rows_out"], result["rows_rejected"]) == (12, 11, 1)
    whole = sum(len(row.captions) for row in rows)
    split = encode_split(itm.load_matcher(f"{recipe.folder}/matcher"), str(tmp_path / "shards" / "test"))
    assert len(split.captions) == whole - len(rows[5].captions) - 1 == len(split.names.caption_ids)
    assert rows[5].key not in split.names.image_keys
    told = [(p.key, p.what) for p in split.problems]
    assert told == [(rows[2].key, "caption"), *[(rows[5].key, "caption")] * len(rows[5].captions), (rows[5].key, "sample")]


def run_of_folds(folder, monkeypatch):
    """A split that has the shape of COCO's 5K test: five folds, of two images here, each image with five captions."""
    monkeypatch.setattr(Coco1KFolds, "images", 10)
    rows = [replace(r, captions=[replace(c, id=f"{r.key}#{k}") for k, c in enumerate((r.captions * 5)[:5])]) for r in records(10)]
    recipe = small_run(folder)
    write_split(folder / "shards" / "test", rows)
    return recipe


def test_a_protocol_of_folds_scores_each_fold_alone_with_the_numbers_of_all_pairs(tmp_path, monkeypatch):
    recipe, asked, score = run_of_folds(tmp_path, monkeypatch), [], score_matrix
    monkeypatch.setattr(scoring, "score_matrix", lambda m, i, c, **o: asked.append(len(i[0]) * len(c[0])) or score(m, i, c, **o))
    by_fold = evaluate.evaluate(recipe, protocol="coco-1k-5fold")["metrics"]
    assert asked == [2 * 10] * 5
    whole = evaluate.evaluate(recipe, protocol="coco-1k-5fold", save_scores=str(tmp_path / "all.npy"))["metrics"]
    assert asked[5:] == [10 * 50]
    assert by_fold == pytest.approx(whole)


def test_tiles_of_folds_hold_their_pairs_alone_and_a_finished_store_of_all_pairs_serves_the_folds_too(tmp_path, monkeypatch):
    recipe = run_of_folds(tmp_path, monkeypatch)
    monkeypatch.setattr(scoring, "by_actors", lambda tiles: (itertools.starmap, lambda value: value, "cpu"))  # tiles in turn, without Ray
    monkeypatch.setattr(scoring, "shared", contextlib.nullcontext)
    scored, by_tiles = [], How(distributed=True)
    monkeypatch.setattr(tiles, "score_matrix", lambda m, i, c, **o: scored.append(len(i[0]) * len(c[0])) or score_matrix(m, i, c, **o))
    by_fold = evaluate.evaluate(recipe, protocol="coco-1k-5fold", how=by_tiles)
    assert scored == [2 * 10] * 5
    assert by_fold["metrics"] == pytest.approx(evaluate.evaluate(recipe, protocol="coco-1k-5fold")["metrics"])
    evaluate.evaluate(recipe, protocol="auto", how=by_tiles)
    assert scored[5:] == [10 * 50]
    again = evaluate.evaluate(recipe, protocol="coco-1k-5fold", tie="optimistic", how=by_tiles)
    assert len(scored) == 6 and again["metrics"] == pytest.approx(by_fold["metrics"])
