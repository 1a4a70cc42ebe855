"""STS12 to 16, STS-B and SICK-R from SentEval's folders: the numbers that its own formulas give, and what is wrong with a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import itm
from itm.evaluation.protocols import Question, find_protocol
from itm.evaluation.senteval import SUBSETS, of_task, read_subset
from pipelines.cli import stage_main
from tests.support.pictures import write
from tests.support.small_split import small_run

WORDS = ["red", "blue", "small", "large", "dog", "cat", "box", "on", "under", "near"]


def sentences(seed: int, count: int) -> list[tuple[str, str, float]]:
    draws = np.random.default_rng(seed)
    return [(" ".join(draws.choice(WORDS, 4)), " ".join(draws.choice(WORDS, 4)), float(draws.integers(0, 26)) / 5) for _ in range(count)]


def senteval(folder: Path) -> Path:
    """The layout of SentEval's data/downstream; every third line of answer-answer has no rating, as published."""
    seed = 0
    for task, subsets in SUBSETS.items():
        for subset in subsets:
            seed += 1
            rows = sentences(seed, 5 + seed)
            gold = ["" if subset == "answer-answer" and n % 3 == 0 else str(rating) for n, (_, _, rating) in enumerate(rows)]
            write(
                folder / "STS" / f"{task}-en-test",
                {
                    f"STS.input.{subset}.txt": "".join(f"{a}\t{b}\n" for a, b, _ in rows),
                    f"STS.gs.{subset}.txt": "".join(f"{g}\n" for g in gold),
                },
            )
    stsb = "".join(f"main\tMSRvid\t2012\t{n}\t{g}\t{a}\t{b}\n" for n, (a, b, g) in enumerate(sentences(90, 12)))
    sick = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n" + "".join(
        f"{n}\t{a}\t{b}\t{g}\tNEUTRAL\n" for n, (a, b, g) in enumerate(sentences(91, 12))
    )
    return write(folder, {"STS/STSBenchmark/sts-test.csv": stsb, "SICK/SICK_test_annotated.txt": sick})


def sentevals_own(results: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """What senteval/sts.py computes of (similarities, ratings) by subset, times 100: results['all']['spearman']."""
    sys_scores = np.concatenate([scores for scores, _ in results.values()])
    gs_scores = np.concatenate([gold for _, gold in results.values()])
    each = [stats.spearmanr(*pair).statistic for pair in results.values()]
    weights = [len(gold) for _, gold in results.values()]
    return {
        "all": 100 * stats.spearmanr(sys_scores, gs_scores).statistic,
        "mean": 100 * np.average(each),
        "wmean": 100 * np.average(each, weights=weights),
    }


def test_a_tasks_numbers_are_those_of_sentevals_formulas():
    draws = np.random.default_rng(3)
    results = {name: (draws.standard_normal(n), draws.integers(0, 6, n).astype(float)) for name, n in (("a", 9), ("b", 30), ("c", 14))}
    want = sentevals_own(results)
    found = of_task({name: pair[0] for name, pair in results.items()}, {name: pair[1] for name, pair in results.items()})
    assert {key: found[f"_{key}" if key != "all" else ""] for key in want} == pytest.approx(want, abs=1e-9)
    assert found["_b"] == pytest.approx(100 * stats.spearmanr(*results["b"]).statistic, abs=1e-9)


def cosines(matcher, rows: list[tuple[str, str]]) -> np.ndarray:
    """One sentence at a time through the matcher's own encoder, as it is written."""
    matcher.inputs.tokenizer.clean = False
    sides = [
        np.stack([matcher.encode_captions(matcher.inputs.captions([row[n]])).vector.detach().numpy()[0] for row in rows]) for n in (0, 1)
    ]
    return (sides[0] * sides[1]).sum(1) / np.linalg.norm(sides[0], axis=1) / np.linalg.norm(sides[1], axis=1)


def test_a_years_folder_is_read_as_senteval_reads_it_and_measured_as_it_measures(tmp_path):
    matcher = itm.load_matcher(f"{small_run(tmp_path).folder}/matcher").eval()
    folder = senteval(tmp_path / "downstream") / "STS" / "STS16-en-test"
    outcome = find_protocol("sts16").measure(matcher, Question(pairs=[str(folder)]))
    results = {}
    for subset in SUBSETS["STS16"]:  # as senteval/sts.py: lines without a rating are left out
        lines = (folder / f"STS.input.{subset}.txt").read_text().splitlines()
        gold = np.array((folder / f"STS.gs.{subset}.txt").read_text().splitlines())
        rated = gold != ""
        results[subset] = cosines(matcher, [tuple(line.split("\t")) for line in np.array(lines)[rated]]), gold[rated].astype(float)
    want = sentevals_own(results)
    assert outcome.metrics["sts_STS16"] == pytest.approx(want["all"], abs=1e-6)
    assert outcome.metrics["sts_STS16_wmean"] == pytest.approx(want["wmean"], abs=1e-6)
    assert outcome.metrics["sts_STS16_mean"] == pytest.approx(want["mean"], abs=1e-6)
    assert outcome.counts == {"pairs": sum(len(gold) for _, gold in results.values()), "rejected": 0}


def test_all_seven_tasks_and_their_mean_come_from_one_command(tmp_path, capsys):
    recipe, folder = small_run(tmp_path), senteval(tmp_path / "downstream")
    (tmp_path / "r.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    asked = ["-c", str(tmp_path / "r.yaml"), "--protocol", "senteval", "--pairs", str(folder)]
    assert stage_main("evaluate", asked) == 0
    assert "sts_STS12_wmean" in capsys.readouterr().out
    path = Path(recipe.folder, "evaluation-senteval-downstream.json")
    metrics = json.loads(path.read_text())["metrics"]
    tasks = [metrics[f"sts_{name}"] for name in (*SUBSETS, "STS-B", "SICK-R")]
    assert metrics["sts_mean"] == pytest.approx(np.mean([round(value, 2) for value in tasks]))
    written = path.stat().st_mtime_ns
    assert stage_main("evaluate", asked) == 0
    assert path.stat().st_mtime_ns == written
    gold = folder / "STS/STS12-en-test/STS.gs.MSRpar.txt"
    gold.write_text("".join(f"{n}\n" for n in range(len(gold.read_text().splitlines()))))
    assert stage_main("evaluate", asked) == 0
    assert json.loads(path.read_text())["metrics"]["sts_STS12"] != metrics["sts_STS12"]


@pytest.mark.parametrize("inner", ["", "STS", "STS/STS12-en-test"])
def test_a_year_is_found_in_sentevals_folder_in_the_folder_of_all_years_and_in_its_own(tmp_path, inner):
    folder = senteval(tmp_path)
    found = find_protocol("sts12").files_of([str(folder / inner)])
    assert len(found) == 10
    assert all(Path(name).exists() for name in found)


def test_a_folder_with_missing_files_or_files_that_do_not_fit_is_refused_by_name(tmp_path):
    folder = senteval(tmp_path)
    with pytest.raises(ValueError, match="names one folder of SentEval"):
        find_protocol("senteval").files_of([str(folder), str(folder)])
    (folder / "STS/STS13-en-test/STS.gs.FNWN.txt").unlink()
    with pytest.raises(ValueError, match=r"1 of 6 files of STS13 are missing, the first is .*STS13-en-test/STS\.gs\.FNWN\.txt"):
        find_protocol("sts13").files_of([str(folder)])
    with pytest.raises(
        ValueError, match=r"10 of 10 files of STS12 are missing, the first is .*nowhere/STS/STS12-en-test/STS\.input\.MSRpar"
    ):
        find_protocol("sts12").files_of([str(tmp_path / "nowhere")])
    (folder / "SICK/SICK_test_annotated.txt").unlink()
    with pytest.raises(ValueError, match=r"2 of 50 files of STS12, .*SICK-R are missing"):
        find_protocol("senteval").files_of([str(folder)])


def test_lines_that_cannot_be_used_are_named_and_refused_above_the_limit(tmp_path):
    write(tmp_path, {"in": "a b\tc d\na\tb\tc\n\tb\na c\td\n", "gold": "1\n2\n3\nhigh\n", "short": "1\n2\n"})
    with pytest.raises(ValueError, match=r"in has 4 lines, .*short has 2: they are not of one subset"):
        read_subset(str(tmp_path / "in"), str(tmp_path / "short"))
    with pytest.raises(
        ValueError,
        match=r"in: 3 of 4 rows cannot be used \(limit 1\.0%\): line 2: 3 columns, two .* empty; line 4: .*gold: the rating 'high'",
    ):
        read_subset(str(tmp_path / "in"), str(tmp_path / "gold"))
