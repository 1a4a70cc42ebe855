"""What each query found, and where two runs disagree, against a count over all queries; nearest neighbours against a full sort."""

from __future__ import annotations

from dataclasses import replace

import torch

from itm.evaluation.dataset import names_of
from itm.evaluation.metrics import rank_queries
from itm.evaluation.protocols import Scored
from itm.report.answers import answers
from itm.report.disagreements import disagreements
from itm.report.neighbours import neighbours
from itm.types import Encoded

OWNERS = torch.arange(36) // 3


def scored(seed: int) -> Scored:
    torch.manual_seed(seed)
    scores = torch.randn(12, 36) + 1.5 * (torch.arange(12)[:, None] == OWNERS)
    names = names_of(12, OWNERS, [f"i{n}" for n in range(12)], [f"c{n}" for n in range(36)])
    return Scored(scores, replace(names, texts=[f"text {n}" for n in range(36)], image_shards=["s"] * 12))


def test_every_query_is_kept_with_its_rank_and_its_best_hits_by_name():
    world = scored(1)
    said = answers(world)
    ranks = rank_queries(world.scores.T, OWNERS[:, None] == torch.arange(12)).best + 1
    assert said["t2i"]["rank"] == ranks.tolist() and said["t2i"]["query"] == list(range(36))
    assert said["i2t"]["hits"][4] == world.scores[4].argsort(descending=True)[:5].tolist()
    assert said["i2t"]["holds"][4] == [int(OWNERS[row] == 4) for row in said["i2t"]["hits"][4]]
    assert said["images"]["7"] == ["i7", "s"] and said["captions"]["35"] == ["c35", "text 35"]


def test_disagreements_count_all_queries_and_show_those_that_one_run_alone_got_right():
    one, other = scored(1), scored(2)
    found = disagreements(answers(one), answers(other))
    for way, (a, b, truth) in {
        "t2i": (one.scores.T, other.scores.T, OWNERS),
        "i2t": (OWNERS[one.scores.argmax(1)], OWNERS[other.scores.argmax(1)], torch.arange(12)),
    }.items():
        right = [(x.argmax(1) if x.dim() == 2 else x) == truth for x in (a, b)]
        wanted = {
            "both": int((right[0] & right[1]).sum()),
            "own": int((right[0] & ~right[1]).sum()),
            "other": int((~right[0] & right[1]).sum()),
            "neither": int((~right[0] & ~right[1]).sum()),
        }
        assert found[way]["counts"] == wanted and found[way]["queries"] == len(truth)
        assert all(row["own"]["right"] and not row["other"]["right"] for row in found[way]["own"])
        assert len(found[way]["own"]) == min(4, wanted["own"]) and len(found[way]["other"]) == min(4, wanted["other"])
    shown = found["t2i"]["own"][0]
    number = int(shown["own"]["caption"].removeprefix("c"))
    assert shown["own"]["hits"][0]["image"] == f"i{OWNERS[number]}"
    assert shown["other"]["hits"][0]["image"] == f"i{int(other.scores[:, number].argmax())}"


def test_runs_that_read_other_images_are_matched_by_the_ids_of_their_queries():
    one, other = answers(scored(1)), answers(scored(1))
    other["captions"]["0"] = ["unknown", "text"]
    assert disagreements(one, other)["t2i"]["queries"] == 35


def test_neighbours_are_the_nearest_other_rows_by_cosine_and_know_what_holds():
    world = scored(1)
    vectors = {"images": Encoded(vector=torch.randn(12, 4)), "captions": Encoded(vector=torch.randn(36, 4), uni=torch.randn(36, 4))}
    labels = [{"scene": n % 3} for n in range(12)]
    found = neighbours(replace(world, **vectors, names=replace(world.names, image_metas=labels)))
    for way, rows, same in (
        ("i2i", vectors["images"].vector, lambda a, b: a % 3 == b % 3),
        ("t2t", vectors["captions"].uni, lambda a, b: a // 3 == b // 3),
    ):
        cosine = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
        for query in found[way]:
            row = query["query"]
            wanted = [n for n in cosine[row].argsort(descending=True).tolist() if n != row][:5]
            assert [hit["row"] for hit in query["hits"]] == wanted
            assert all(hit["holds"] == same(row, hit["row"]) for hit in query["hits"])
    assert len(found["i2i"]) == len(found["t2t"]) == 6
    assert neighbours(replace(world, images=vectors["images"]))["i2i"][0]["hits"][0]["holds"] is None
    assert neighbours(world) == {}
