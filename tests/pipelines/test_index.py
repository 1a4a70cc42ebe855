"""The index stage: what is encoded once is found as scoring finds it; a kill costs nothing; what is other is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from itm.config import Indexed
from itm.data import files
from itm.data.formats import NewerFormat
from itm.data.manifest import Manifest, write_manifest
from itm.data.records import Record
from itm.data.shards import read_manifest, write_shard
from itm.matchers.folder import save_matcher
from itm.retrieval.engine import Engine, Question
from itm.retrieval.index import Index
from itm.retrieval.store import check_vectors, stored
from itm.types import Encoded, Matcher
from pipelines import index as stage
from pipelines import pack as packing
from pipelines import search
from pipelines.cli import stage_main
from pipelines.contract import stages_of
from pipelines.indexing import actors
from pipelines.indexing.building import Wanted
from tests.support.disc_index import COLOURS, SCAN, disc, write_discs
from tests.support.registry_world import matcher_folder, picture, tiny_matcher
from tests.support.small_split import small_run


@pytest.fixture
def shards(tmp_path: Path) -> str:
    return write_discs(tmp_path / "shards" / "test", per_shard=2)


@pytest.fixture(scope="module")
def matcher() -> Matcher:
    return tiny_matcher(2)


def index(matcher: Matcher | str, shards: str | tuple[str, ...], output: Path | str, **given) -> Index:
    wanted = Wanted(matcher, (shards,) if isinstance(shards, str) else shards, str(output), batch_size=2, **given)
    assert stage.index(wanted) is not None
    return Index.open(str(output), matcher if isinstance(matcher, Matcher) else None)


def answers(matcher: Matcher, index: Index, **given) -> dict[str, float]:
    (found,) = Engine(matcher, index, "cpu").answer([Question("a red circle", k=99, **given)])
    return {hit.key: hit.score for hit in found.hits}


def bytes_of(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that are encoded from now on."""
    seen: list[str] = []
    whole = actors.encode_samples
    monkeypatch.setattr(actors, "encode_samples", lambda m, uri, *rest: seen.append(Path(uri).name) or whole(m, uri, *rest))
    return seen


@pytest.mark.parametrize(("dtype", "off"), [("fp32", 1e-6), ("fp16", 2e-3), ("int8", 2e-2)])
@pytest.mark.parametrize("kind", ["dual", "scan"])
def test_an_index_answers_as_scoring_every_pair_does(dtype, off, kind, shards, tmp_path):
    matcher = tiny_matcher(2, SCAN if kind == "scan" else None)
    made = index(matcher, shards, tmp_path / "index", dtype=dtype)
    assert made.images.fields == ({"vector", "parts", "mask"} if kind == "scan" else {"vector"})
    wanted = answers(matcher, Index.of_shards(matcher, shards))
    found = answers(matcher, made)
    assert len(found) == 6
    assert found == pytest.approx(wanted, abs=off)
    assert answers(matcher, made, where={"colour": ["blue"], "size": ["34.."]}) == pytest.approx({"k5": found["k5"]}, abs=1e-6)
    questions = [Question(image=picture("red"), find="captions", k=3), Question(image=picture("red"), k=2)]
    captions, images = Engine(matcher, made, "cpu").answer(questions)
    assert [len(hit.captions) for hit in captions.hits] == [1, 1, 1]
    best = images.hits[0]
    assert best.metadata == {"colour": COLOURS[int(best.key[1])], "size": 32 + int(best.key[1]), "image_id": best.key}


def test_the_vectors_of_a_shard_lie_in_tar_order_in_one_arrow_file(shards, tmp_path, matcher):
    index(matcher, shards, tmp_path / "index")
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "index" / "test" / "00001.arrow"))).read_all()
    said = json.loads(table.schema.metadata[b"itm"])
    assert table["key"].to_pylist() == ["k2", "k3"]
    assert (said["format"], said["dtype"], said["images"], said["captions"]) == (1, "fp16", 2, 4)
    assert said["sha256"] == read_manifest(shards).shards[1].sha256
    with torch.no_grad():
        wanted = matcher.encode_images(matcher.inputs.images([picture(COLOURS[n], 32 + n) for n in (2, 3)])).vector
    assert torch.tensor(table["vector"].to_pylist()) == pytest.approx(wanted, abs=1e-3)


def test_a_build_that_was_stopped_goes_on_and_ends_with_the_same_bytes(shards, tmp_path, matcher, monkeypatch):
    for name in ("whole", "torn"):
        index(matcher, shards, tmp_path / name)
    for lost in ("index.json", "test/00001.arrow", "test/00002.captions.arrow"):
        (tmp_path / "torn" / lost).unlink()
    with pytest.raises(ValueError, match=r"no finished index at .*torn .*, though it holds 4 files of one that was begun"):
        Index.open(str(tmp_path / "torn"), matcher)
    seen = spied(monkeypatch)
    index(matcher, shards, tmp_path / "torn")
    assert seen == ["00001.tar", "00002.tar"]
    assert bytes_of(tmp_path / "torn") == bytes_of(tmp_path / "whole")
    seen.clear()
    index(matcher, shards, tmp_path / "torn")
    assert not seen


def test_what_is_added_is_encoded_alone_and_what_is_gone_is_not_found(shards, tmp_path, matcher, monkeypatch):
    index(matcher, shards, tmp_path / "index")
    before, split = read_manifest(shards), Path(shards)
    info = write_shard(str(split / "00003.tar"), [disc(6, "red"), disc(7, "green")])
    (split / "00001.tar").unlink()
    write_manifest(shards, before.model_copy(update={"shards": [before.shards[0], before.shards[2], info]}))
    with pytest.raises(ValueError, match=r"has changed since the index .*: 00001.tar was .*, and is not there now: run `itm index --add`"):
        Index.open(str(tmp_path / "index"), matcher)
    with pytest.raises(ValueError, match=r"is an index of other shards: .* Bring it up to date with --add"):
        index(matcher, shards, tmp_path / "index")
    seen = spied(monkeypatch)
    made = index(matcher, (), tmp_path / "index", add=True)
    assert seen == ["00003.tar"]
    assert set(answers(matcher, made)) == {"k0", "k1", "k4", "k5", "k6", "k7"}
    assert answers(matcher, made) == pytest.approx(answers(matcher, Index.of_shards(matcher, shards)), abs=2e-3)
    said = json.loads((tmp_path / "index" / "index.json").read_text())
    assert [entry["name"] for entry in said["splits"][0]["shards"] if entry.get("gone")] == ["00001.tar"]


def test_parts_on_machines_of_their_own_are_merged_to_the_same_bytes(shards, tmp_path, matcher):
    index(matcher, shards, tmp_path / "whole")
    for k in (1, 2):
        assert stage.index(Wanted(matcher, (shards,), str(tmp_path / f"part{k}"), batch_size=2, part=(k, 2))) is None
    parts = (str(tmp_path / "part1"), str(tmp_path / "part2"))
    assert not set(bytes_of(tmp_path / "part1")) & set(bytes_of(tmp_path / "part2"))
    index(matcher, shards, tmp_path / "merged", merge=parts)
    assert bytes_of(tmp_path / "merged") == bytes_of(tmp_path / "whole")


def test_several_splits_in_one_index_are_told_apart_and_a_photo_in_both_is_one_image(tmp_path, matcher):
    train = write_discs(tmp_path / "train", ["red", "green"])
    test = write_discs(tmp_path / "test", ["black", "blue"])
    made = index(matcher, (train, test), tmp_path / "index")
    assert list(made.names.image_keys) == ["train/00000/k0", "train/00000/k1", "test/00000/k0", "test/00000/k1"]
    assert set(answers(matcher, made, where={"split": ["test"]})) == {"test/00000/k0", "test/00000/k1"}
    assert made.sample("test/00000/k1").meta["colour"] == "blue"


def test_photos_that_cannot_be_read_are_listed_and_the_others_found(tmp_path, matcher, capsys):
    split = tmp_path / "test"
    rows = [disc(0, "red"), Record("bad", "test", [], b"no photo", "png"), Record("bare", "test", [], picture("blue"), "png")]
    write_manifest(str(split), Manifest(split="test", source="x", shards=[write_shard(str(split / "00000.tar"), rows)]))
    made = index(matcher, str(split), tmp_path / "index")
    assert set(answers(matcher, made)) == {"k0", "bare"}
    row = json.loads((tmp_path / "index" / "quarantine.jsonl").read_text())
    assert (row["key"], row["shard"]) == ("bad", "00000.tar")
    assert row["reason"].startswith("cannot decode image")
    catalogue = stage.index(Wanted(matcher, (str(split),), str(tmp_path / "index"), batch_size=2))
    assert stage.flow_line(catalogue) == "3 images = 2 indexed + 1 rejected, 2 captions in 1 shards"


def test_an_index_moves_with_its_shards_and_is_searched_without_them(shards, tmp_path, matcher):
    index(matcher, shards, Path(shards) / "index")
    wanted = answers(matcher, Index.open(f"{shards}/index", matcher))
    moved = tmp_path / "moved" / "test"
    shutil.copytree(shards, moved)
    made = Index.open(str(moved / "index"), matcher)
    assert answers(matcher, made) == wanted
    assert made.names.image_shards[0] == str(moved / "00000.tar")
    shutil.move(str(moved / "index"), tmp_path / "alone")
    shutil.rmtree(tmp_path / "moved")
    with pytest.raises(ValueError, match="00000.tar"):
        Index.open(str(tmp_path / "alone"), matcher).sample("k0")


def test_the_command_makes_an_index_that_search_finds(shards, tmp_path, capsys):
    folder = str(matcher_folder(tmp_path / "m", 2))
    assert stage_main("index", ["--model", folder, "--shards", shards, "--workers", "0"]) == 0
    assert capsys.readouterr().out == f"6 images = 6 indexed + 0 rejected, 12 captions in 3 shards; {shards}/index\n"
    found = search.search("a red circle", model=folder, shards=shards, k=9)
    assert found.hits[0].metadata
    assert sorted(os.listdir(f"{shards}/index")) == ["index.json", "test"], "the search read it, and kept nothing of its own"
    assert stage_main("search", ["x", "--model", folder, "--index", f"{shards}/index", "--where", "colour=blue", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert {hit["key"]: hit["metadata"]["colour"] for hit in hits} == {"k1": "blue", "k5": "blue"}
    assert stage_main("search", ["x", "--model", folder, "--index", f"{shards}/index", "--where", "age=3"]) == 2
    assert "has no column 'age' to filter by; it has colour, image_id, key, shard, size, split" in capsys.readouterr().err


def test_what_cannot_be_indexed_or_opened_is_refused_in_a_sentence(shards, tmp_path, matcher):
    made = tmp_path / "index"
    index(matcher, shards, made)
    with pytest.raises(ValueError, match=r"was made by another matcher: a dual of identity \w{12}, and this dual is \w{12}"):
        Index.open(str(made), tiny_matcher(3))
    with pytest.raises(ValueError, match=r"holds an index of other choices \(matcher \w{12}, not \w{12}\): name another --output"):
        index(tiny_matcher(3), shards, made)
    with pytest.raises(ValueError, match=r"holds an index of other choices \(dtype fp16, not int8\)"):
        index(matcher, shards, made, dtype="int8")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no manifest.json and no .tar in .*empty"):
        index(matcher, str(tmp_path / "empty"), tmp_path / "other")
    with pytest.raises(ValueError, match=r"no finished index at .*nowhere \(index.json is missing\): run `itm index`"):
        Index.open(str(tmp_path / "nowhere"), matcher)
    (made / "test" / "00001.captions.arrow").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"00001.captions.arrow, which the index needs, cannot be read .*: run `itm index` again"):
        Index.open(str(made), matcher)
    (made / "index.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(NewerFormat, match="index.json has format 9, this version reads up to 2"):
        Index.open(str(made), matcher)


@pytest.mark.parametrize("fields", [{"dtype": "fp8"}, {"part": (3, 2)}, {"shards": ()}, {"batch_size": 0}])
def test_choices_that_cannot_be_are_refused(fields):
    with pytest.raises(ValueError, match=r"fp8 is unknown|--part 3/2 is no share|name what to index|--batch-size is 0"):
        Wanted(**{"model": "m", "shards": ("s",), "output": "o", **fields}).check()


def test_codes_of_eight_bits_are_off_by_half_a_step_and_vectors_of_zeros_are_refused():
    torch.manual_seed(0)
    vectors = torch.randn(50, 64)
    codes, scale = stored(vectors, "int8")
    assert codes.dtype == torch.int8
    assert ((codes.float() * scale[:, None] - vectors).abs() <= scale[:, None] * 0.5001).all()
    vectors[7] = 0
    with pytest.raises(ValueError, match="image '7' has a vector of zeros, as have 1 in all"):
        check_vectors(Encoded(vector=vectors), "image", [str(n) for n in range(50)])
    vectors[7, 0] = torch.nan
    with pytest.raises(ValueError, match="image '7' has a vector that is not finite"):
        check_vectors(Encoded(vector=vectors), "image", [str(n) for n in range(50)])


def test_a_plain_folder_of_photos_is_packed_and_found_and_grows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        packing, "_run_jobs", lambda r, jobs, t: {j.uri: packing.Receipt.model_validate_json(packing.pack_shard(j)) for j in jobs}
    )
    monkeypatch.setattr(packing, "_tracked", lambda *args: nullcontext(lambda manifest: None))
    folder, photos = str(matcher_folder(tmp_path / "m", 2)), tmp_path / "photos"
    photos.mkdir()
    for n, colour in enumerate(COLOURS):
        (photos / f"{n}.png").write_bytes(picture(colour, 32 + n)[: 60 if n == 3 else None])
    asked = ["--model", folder, "--photos", str(photos), "--output", str(tmp_path / "index"), "--workers", "0"]
    assert stage_main("index", asked) == 0
    assert capsys.readouterr().out.startswith("5 images = 5 indexed + 0 rejected, 0 captions in 1 shards")
    matcher = tiny_matcher(2)
    assert set(answers(matcher, Index.open(str(tmp_path / "index"), matcher))) == {"0", "1", "2", "4", "5"}
    (photos / "new.png").write_bytes(picture("white"))
    assert stage_main("index", asked) == 2
    assert "Bring it up to date with --add" in capsys.readouterr().err
    assert stage_main("index", [*asked, "--add"]) == 0
    assert set(answers(matcher, Index.open(str(tmp_path / "index"), matcher))) == {"0", "1", "2", "4", "5", "new"}
    (tmp_path / "none").mkdir()
    assert stage_main("index", [*asked[:3], str(tmp_path / "none"), "--output", str(tmp_path / "other")]) == 2
    assert "no image in" in capsys.readouterr().err


def test_an_index_of_a_store_is_that_of_a_disk_and_a_store_that_lost_a_file_is_named(shards, tmp_path, matcher):
    store = "memory://itm-index"
    for path in Path(shards).iterdir():
        files.write_atomic(f"{store}/test/{path.name}", path.read_bytes())
    made = index(matcher, f"{store}/test", f"{store}/test/index")
    assert answers(matcher, made) == answers(matcher, index(matcher, shards, tmp_path / "index"))
    assert made.sample("k4").meta["colour"] == "black"
    files.delete(f"{store}/test/index/test/00002.captions.arrow")
    with pytest.raises(ValueError, match=r"memory://.*00002.captions.arrow, which the index needs, cannot be read"):
        Index.open(f"{store}/test/index", matcher)
    for uri in [uri for folder in ("", "/index", "/index/test") for uri in files.list_files(f"{store}/test{folder}")]:
        files.delete(uri)
    with pytest.raises(ValueError, match=r"no finished index at memory://itm-index/test/index"):
        Index.open(f"{store}/test/index", matcher)


def test_a_recipe_names_the_splits_that_a_run_indexes_and_the_stage_is_done_until_weights_or_shards_change(tmp_path):
    recipe = small_run(tmp_path, 6, index={"splits": ["test"], "dtype": "int8"}, train={"workers": 0})
    (contract,) = [c for c in stages_of(recipe) if c.stage == "index"]
    assert contract.done(recipe) is None
    line = contract.work(recipe)
    assert line == "6 images = 6 indexed + 0 rejected, 30 captions in 2 shards"
    assert contract.done(recipe) == line
    assert contract.manifest(recipe) == [f"{recipe.folder}/index/index.json"]
    assert "index" not in [c.stage for c in stages_of(recipe.model_copy(update={"index": Indexed()}))]
    assert recipe.fingerprint() == recipe.model_copy(update={"index": Indexed()}).fingerprint()
    other = tiny_matcher(3)
    save_matcher(other, f"{recipe.folder}/matcher")
    assert contract.done(recipe) is None
    contract.work(recipe)
    assert Index.open(f"{recipe.folder}/index", other).settings == {}
