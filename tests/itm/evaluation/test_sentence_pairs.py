import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import itm
from itm.evaluation.dataset import encode_texts
from itm.evaluation.sentence_pairs import read_pairs, spearman, sts
from pipelines.cli import stage_main
from tests.support.small_split import small_run

GLUE = 'index\tgenre\tsentence1\tsentence2\tscore\n0\tnews\tA "red" dog.\tA dog, red.\t4.5\n1\tnews\tA cat.\tNo cat.\t1.0\n'
ORIGINAL = "main\tMSRvid\t2012\t0001\t4.5\tA red dog.\tA dog.\nmain\tMSRvid\t2012\t0002\t1.0\tA cat.\tNo cat.\n"
SICK = (
    "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n6\tA red dog\tA dog\t4.5\tYES\n7\tA cat\tNo cat\t1\tNEUTRAL\n"
)


def write(folder: Path, text: str, name: str = "pairs.tsv") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize("values", [[1, 2, 3, 4], [3, 1, 1, 2, 2, 2, 9], list(range(20)), [0.5, 0.5, 0.1]])
def test_rank_correlation_equals_scipys_also_under_ties(values):
    other = np.random.default_rng(0).integers(0, 4, len(values)).astype(float)
    assert spearman(np.array(values, float), other) == pytest.approx(stats.spearmanr(values, other).statistic, abs=1e-12)


def test_rank_correlation_of_a_constant_is_not_a_number():
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))


@pytest.mark.parametrize(("text", "first"), [(GLUE, 'A "red" dog.'), (ORIGINAL, "A red dog."), (SICK, "A red dog")])
def test_sts_b_with_and_without_header_and_sick_are_recognised(tmp_path, text, first):
    pairs = read_pairs(write(tmp_path, text))
    assert (pairs.left[0], pairs.gold, pairs.bad) == (first, [4.5, 1.0], [])
    assert pairs.right[1].lower().startswith("no cat")


def test_any_headers_or_column_numbers_can_be_named_and_csv_quotes_are_read(tmp_path):
    named = read_pairs(write(tmp_path, 'a,b,sim\n"One, two",Two,0.5\nThree,"Fo""ur",0.1\n', "p.csv"), ["a", "b", "sim"])
    assert (named.left, named.right, named.gold) == (["One, two", "Three"], ["Two", 'Fo"ur'], [0.5, 0.1])
    assert read_pairs(write(tmp_path, "0.5\tx\ty\n0.1\tz\tw\n"), ["2", "3", "1"]).left == ["x", "z"]


def test_bad_rows_are_counted_and_named_and_refused_above_the_limit(tmp_path):
    rows = GLUE + "2\tnews\tonly one\n3\tnews\t \tempty\t2\n4\tnews\ta\tb\thigh\n5\tnews\ta\tb\tnan\n\n"
    pairs = read_pairs(write(tmp_path, rows), max_reject_rate=0.7)
    assert [line for line, _ in pairs.bad] == [4, 5, 6, 7]
    assert [reason.split()[-1] for _, reason in pairs.bad] == ["needed", "empty", "'high'", "number"]
    with pytest.raises(ValueError, match=r"4 of 6 rows cannot be used \(limit 1.0%\): line 4: 3 columns, column 5 is needed; line 5"):
        read_pairs(write(tmp_path, rows))


def test_unknown_columns_are_refused_with_those_of_the_file(tmp_path):
    with pytest.raises(ValueError, match="none of the known columns; choose by --pair-columns .* from: a, b, c"):
        read_pairs(write(tmp_path, "a\tb\tc\n1\t2\t3\n"))
    with pytest.raises(ValueError, match="has no column 'left'; its first line is: a, b, c"):
        read_pairs(write(tmp_path, "a\tb\tc\n1\t2\t3\n"), ["left", "b", "c"])


def test_the_value_is_the_rank_correlation_of_the_matchers_own_cosines(tmp_path):
    matcher = itm.load_matcher(f"{small_run(tmp_path).folder}/matcher")
    rng = np.random.default_rng(0)
    words = ["red", "blue", "small", "large", "dog", "cat", "box", "on", "under", "near"]
    texts = [" ".join(rng.choice(words, 4)) for _ in range(40)]
    rows = [f"{a}\t{b}\t{rating}" for a, b, rating in zip(texts[::2], texts[1::2], rng.integers(0, 6, 20), strict=True)]
    pairs = read_pairs(write(tmp_path, "sentence1\tsentence2\tscore\n" + "\n".join(rows)))
    left, right = (encode_texts(matcher, side).vector for side in (pairs.left, pairs.right))
    want = stats.spearmanr((left * right).sum(1) / (left.norm(dim=1) * right.norm(dim=1)), pairs.gold).statistic
    outcome = sts(matcher, [pairs], batch_size=7)
    assert outcome.metrics == {"sts_pairs": pytest.approx(100 * want, abs=1e-6)}
    assert outcome.counts == {"pairs": 20, "rejected": 0}


def test_sentences_are_read_as_they_stand_also_by_a_matcher_that_cleans_captions_up(tmp_path):
    matcher = itm.load_matcher(f"{small_run(tmp_path).folder}/matcher")
    seen = []
    matcher.inputs.tokenizer._encode = lambda text, encode=matcher.inputs.tokenizer._encode: (
        seen.append(matcher.inputs.tokenizer.clean) or encode(text)
    )
    sts(matcher, [read_pairs(write(tmp_path, GLUE))])
    assert seen == [False] * 4
    assert matcher.inputs.tokenizer.clean


def test_the_command_writes_values_hashes_and_bad_rows_and_computes_them_once(tmp_path, capsys):
    recipe = small_run(tmp_path)
    path = write(tmp_path, GLUE + "".join(f"{n}\tnews\tred dog {n}\tdog {n}\t{n}\n" for n in range(300)) + "x\ty\n", "sts-test.tsv")
    asked = ["--protocol", "sts", "--pairs", path, "--matcher", f"{recipe.folder}/matcher"]
    assert stage_main("evaluate", asked) == 0
    result = json.loads(Path(f"{path}.evaluation.json").read_text())
    assert f"{result['metrics']['sts_sts-test']:.2f}" in capsys.readouterr().out
    assert result["rejected_rows"] == [[path, 304, "2 columns, column 5 is needed"]]
    assert len(result["matcher_hash"]) == len(result["split_hash"]) == 12
    changed = Path(f"{path}.evaluation.json").stat().st_mtime_ns
    assert stage_main("evaluate", asked) == 0
    assert Path(f"{path}.evaluation.json").stat().st_mtime_ns == changed


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--protocol", "sts", "--pairs", "x.tsv"], "protocol sts needs -c RECIPE or --matcher FOLDER"),
        (["--protocol", "sts", "--matcher", "m"], "protocol sts needs --pairs FILE"),
        (["--protocol", "isd", "--matcher", "m"], "protocol isd needs -c RECIPE"),
    ],
)
def test_a_protocol_without_what_it_needs_is_refused_in_one_line(capsys, asked, message):
    assert stage_main("evaluate", asked) == 2
    assert message in capsys.readouterr().err


def test_a_matcher_without_caption_vectors_is_refused(tmp_path):
    class Pairwise(itm.types.Matcher):
        def encode_captions(self, captions):
            return itm.types.Encoded(parts=captions.tokens[..., None].float(), mask=captions.mask)

    matcher = Pairwise()
    matcher.inputs = itm.load_matcher(f"{small_run(tmp_path).folder}/matcher").inputs
    with pytest.raises(ValueError, match="need caption vectors"):
        sts(matcher, [read_pairs(write(tmp_path, GLUE))])
