import numpy as np
import pytest
import torch

from itm.evaluation.coco_truth import relevance
from itm.evaluation.dataset import Names, names_of
from itm.evaluation.metrics import retrieval_metrics
from itm.evaluation.protocols import Scored, folds, run_protocol, same_label_metrics
from itm.report.gallery import examples, histogram
from itm.types import Encoded


def scored(images: int = 10, each: int = 5, **more) -> Scored:
    return Scored(torch.randn(images, images * each), names_of(images, torch.arange(images * each) // each), **more)


def test_auto_reports_metrics_chance_counts_and_says_in_words_what_it_measured():
    outcome = run_protocol("auto", scored())
    assert set(outcome.chance) == {name for name in outcome.metrics if not name.endswith("medr")}
    assert outcome.counts == {"images": 10, "captions": 50}
    assert outcome.protocol == "all images x all captions; annotated pairs; ties pessimistic"


def test_folds_are_the_mean_over_consecutive_images_each_against_its_own_captions():
    world = scored(images=20)
    mean, _ = folds(world, 4)
    rows = [
        retrieval_metrics(world.scores[i : i + 5, 5 * i : 5 * i + 25].clone(), (torch.arange(5), torch.arange(25) // 5))
        for i in (0, 5, 10, 15)
    ]
    assert mean == pytest.approx({name: np.mean([row[name] for row in rows]) for name in rows[0]})


@pytest.mark.parametrize("protocol", ["flickr30k-1k", "coco-5k", "coco-1k-5fold"])
def test_a_protocol_that_does_not_fit_the_split_is_refused_with_both_sizes(protocol):
    with pytest.raises(ValueError, match=f"{protocol} is defined on [15],000 images .* this split has 10 and 50"):
        run_protocol(protocol, scored())


def test_eccv_is_refused_on_a_split_that_is_not_coco():
    with pytest.raises(ValueError, match="protocol eccv asks 1,261 images, but this split holds only"):
        run_protocol("eccv", scored())


def test_an_unknown_protocol_is_refused_with_the_near_one():
    with pytest.raises(ValueError, match="unknown protocol 'coco'; did you mean 'coco-5k'"):
        run_protocol("coco", scored())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (Names(["a", "b", "a"], ["0", "1", "2"], torch.tensor([0, 1, 2])), "1 image keys occur more than once, the first is 'a'"),
        (Names(["a", "b", "c"], ["0", "1", "1"], torch.tensor([0, 1, 2])), "1 caption ids occur more than once, the first is '1'"),
        (Names(["a", "b", "c"], ["0", "1", "2"], torch.tensor([0, -1, 2])), "1 of 3 captions have no image, the first is '1'"),
        (Names(["a", "b", "c"], ["0", "1", "2"], torch.tensor([0, 1, 1])), "1 of 3 images have no caption, the first is 'c'"),
    ],
)
def test_bad_ids_are_refused_with_their_number_and_the_first_of_them(names, message):
    with pytest.raises(ValueError, match=message):
        run_protocol("auto", Scored(torch.randn(3, 3), names))


def test_a_nan_score_is_named_by_the_ids_of_its_pair():
    scores = torch.zeros(2, 2)
    scores[1, 0] = torch.nan
    with pytest.raises(ValueError, match="1 of 4 scores are NaN, the first at image 'cat', caption 'c7'"):
        run_protocol("auto", Scored(scores, names_of(2, torch.tensor([0, 1]), ["dog", "cat"], ["c7", "c8"])))


def test_image_to_image_finds_the_other_image_of_the_same_scene():
    vectors = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [0.5, 0.5]])
    names = Names(list("abcde"), list("01234"), torch.arange(5), image_metas=[{"scene": s} for s in "xxyyz"])
    outcome = run_protocol("i2i", Scored(torch.eye(5), names, images=Encoded(vector=vectors)))
    assert outcome.metrics == {"i2i_r1": 100.0, "i2i_map_at_r": 1.0, "i2i_r_precision": 1.0}
    assert outcome.counts == {"rows": 5, "queries": 4}
    assert outcome.chance == pytest.approx({"i2i_r1": 25.0, "i2i_map_at_r": 0.25, "i2i_r_precision": 0.25})


def test_caption_to_caption_prefers_the_uni_modal_head_where_there_is_one():
    names = names_of(2, torch.tensor([0, 0, 1, 1]))
    good, bad = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]), torch.tensor([[1.0, 0], [0, 1], [1, 0.1], [0.1, 1]])
    world = Scored(torch.randn(2, 4), names, captions=Encoded(vector=bad, uni=good))
    assert run_protocol("t2t", world).metrics["t2t_r1"] == 100.0


def test_uni_modal_protocols_without_vectors_or_labels_are_refused():
    with pytest.raises(ValueError, match="need caption vectors"):
        run_protocol("t2t", scored())
    with pytest.raises(ValueError, match="needs a scene, label or class"):
        run_protocol("i2i", scored())
    with pytest.raises(ValueError, match="nothing to retrieve"):
        same_label_metrics(torch.randn(3, 2), torch.arange(3))


def test_coco_truth_reads_ids_from_metadata_or_keys_and_refuses_other_ids():
    with pytest.raises(ValueError, match="image key 'dog' is no COCO number"):
        relevance("cxc", ["dog"], ["1"])
    with pytest.raises(ValueError, match="holds only 1 of them"):
        relevance("cxc", ["COCO_val2014_000000205636"], ["1"])


def test_examples_show_right_and_wrong_queries_with_their_best_hits():
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.3, 0.1], [0.1, 0.2, 0.7]])
    shown = examples(Scored(scores, names_of(3, torch.arange(3))), each=1)["i2t"]
    assert [(row["query"], row["right"], row["rank"]) for row in shown] == [(0, True, 1), (1, False, 2)]
    assert [hit["row"] for hit in shown[1]["hits"]] == [0, 1, 2]
    assert [hit["holds"] for hit in shown[1]["hits"]] == [False, True, False]


def test_the_histogram_normalises_positives_and_negatives_by_themselves():
    found = histogram(Scored(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), names_of(2, torch.arange(2))), bins=4)
    assert found == {"edges": [0.0, 0.25, 0.5, 0.75, 1.0], "positives": [0, 0, 0, 1.0], "negatives": [1.0, 0, 0, 0]}
