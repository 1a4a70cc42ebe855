"""`itm init` on a folder as the authors of a paper published it writes that paper's recipe, with its paths set to where the data lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from itm.config import load_recipe
from pipelines.cli import RECIPES
from pipelines.init import init
from pipelines.pack import open_source
from tests.support import authors_layouts


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("authors")
    for name in ("f30k", "coco"):
        authors_layouts.precomp(root, name)
        authors_layouts.cusa(root, name)
        authors_layouts.uniter(root, name)
    return root


@pytest.fixture
def elsewhere(laid_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder is not where the data lie."""
    monkeypatch.chdir(tmp_path)
    return laid_out


@pytest.mark.parametrize(
    ("folder", "recipe"),
    [
        ("data/f30k_precomp", "sgr-f30k"),
        ("data/coco_precomp", "sgr-coco"),
        ("data/f30k", "cusa-clip-b32-f30k"),
        ("data/coco", "cusa-clip-b32-coco"),
        ("data/uniter", "iais-f30k-base"),
    ],
)
def test_the_recipe_of_the_paper_is_written_and_reads_the_data_where_they_lie(elsewhere: Path, folder: str, recipe: str) -> None:
    said = "\n".join(init([str(elsewhere / folder)], "mine.yaml", {}))
    assert f"published these data are laid out as their authors published them: {recipe}; also " in said
    mine, shipped = load_recipe("mine.yaml"), load_recipe(RECIPES / f"{recipe}.yaml")
    mine_flat, shipped_flat = mine.flat(), shipped.flat()
    differ = {key for key in mine_flat | shipped_flat if mine_flat.get(key) != shipped_flat.get(key)}
    assert all(key.startswith(("data.source.options.", "teachers.image.options.path", "text.path", "train.use_gpu")) for key in differ), (
        differ
    )
    assert mine.data.source is not None
    source = open_source(mine.data.source)
    assert source.count("train") == authors_layouts.TRAIN


def test_a_vocabulary_that_is_not_there_is_told_and_one_of_the_captions_taken(elsewhere: Path, tmp_path: Path) -> None:
    authors_layouts.precomp(tmp_path / "bare", "f30k")
    for file in (tmp_path / "bare" / "vocab").iterdir():
        file.unlink()
    said = "\n".join(init([str(tmp_path / "bare" / "data" / "f30k_precomp")], "mine.yaml", {}))
    assert "no f30k_precomp_vocab.json near" in said
    assert load_recipe("mine.yaml").text.path is None


def test_a_small_model_may_be_asked_for_instead_and_other_sets_get_one(elsewhere: Path, tmp_path: Path) -> None:
    init([str(elsewhere / "data" / "f30k_precomp")], "small.yaml", {}, model="scratch")
    assert load_recipe("small.yaml").model.kind == "dual"
    (elsewhere / "data" / "f30k_precomp").rename(tmp_path / "mine")
    try:
        init([str(tmp_path / "mine")], "other.yaml", {})
        assert load_recipe("other.yaml").model.kind == "dual"
    finally:
        (tmp_path / "mine").rename(elsewhere / "data" / "f30k_precomp")
