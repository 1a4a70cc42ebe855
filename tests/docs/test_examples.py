"""The Python on the pages runs as it stands, in a folder that holds what the pages speak of."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from itm.tracking.registry import promote
from itm.tracking.runs import Tracker
from pipelines import teach
from pipelines.cli import stage_main
from tests.support import ROOT
from tests.support.documents import NAMES, fenced
from tests.support.registry_world import matcher_folder, register_matcher
from tests.support.small_teaching import pack, recipe, scenes

pytest_plugins = ["tests.support.registry_fixtures", "tests.support.teaching_fixtures"]
BLOCKS = [(name, number) for name in NAMES for number, _ in enumerate(fenced(ROOT / name, "python"))]


def run(block: str) -> None:
    exec(compile(block, "example", "exec"), {"__name__": "example"})


def a_photo(folder: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (80, 60), "red").save(file, "JPEG")
    (folder / "photo.jpg").write_bytes(file.getvalue())


@pytest.fixture
def world(here: Path, registry: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packed scenes with a store of image statistics, a trained matcher's folder, a champion in the registry, a photo."""
    monkeypatch.chdir(here)
    pack(here / "data" / "shards", scenes(6))
    text = {"kind": "scenes_text", "options": {"world": "tiny"}}
    teach.teach(recipe(here / "data" / "shards", {"kind": "statistics"}, text))
    for form, output in (("parquet", "exported"), ("webdataset", "exported/train")):
        stage_main("export", ["teachers", "data/shards/train", "--to", form, "-o", output])
    folder = matcher_folder(here / "runs" / "my-photos" / "matcher")
    with Tracker.start("docs", "example") as tracker:
        version = register_matcher(folder, "itm-matcher", tracker.run_id, {"rsum": 1.0})
    promote("itm-matcher", version, "rsum", 1.0)
    a_photo(here)
    return here


def test_the_pages_hold_examples_of_every_kind_of_use() -> None:
    uses = ("start", "data", "teachers", "exporting", "extending", "registry-and-serving")
    assert {f"docs/{use}.md" for use in uses} <= {name for name, _ in BLOCKS}


@pytest.mark.e2e
@pytest.mark.parametrize(("name", "number"), BLOCKS)
def test_the_python_of_a_page_runs(name: str, number: int, world: Path) -> None:
    block = fenced(ROOT / name, "python")[number]
    if "data/shards/val" in block:
        pack(world / "made", scenes(60), per_shard=60)
        shutil.move(world / "made" / "train", world / "data" / "shards" / "val")
    if "data/index" in block:
        model = ["--model", "runs/my-photos/matcher", "--shards", "data/shards/train"]
        assert stage_main("index", [*model, "--output", "data/index", "--workers", "0"]) == 0
    run(block)


def test_a_store_is_read_without_this_code(here: Path) -> None:
    """The example of the page on teachers, in a process that cannot import itm."""
    pack(here / "data" / "shards", scenes(6))
    teach.teach(recipe(here / "data" / "shards", image={"kind": "statistics"}))
    (example,) = fenced(ROOT / "docs" / "teachers.md", "python")
    assert len(example.strip().splitlines()) <= 10
    block = "import sys; sys.modules['itm'] = sys.modules['pipelines'] = None\n" + example + "print(len(vectors))\n"
    done = subprocess.run([sys.executable, "-c", block], cwd=here, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "4"), done.stderr


def test_an_export_trains_elsewhere(here: Path) -> None:
    """The three examples of the page on exporting, in a process that cannot import itm; ten lines each but the loop of open_clip's kind."""
    pack(here / "data" / "shards", scenes(10))
    truth = {side: {"kind": f"scenes_{side}", "options": {"world": "tiny"}} for side in ("image", "text")}
    teach.teach(recipe(here / "data" / "shards", **truth))
    for form, output in (("parquet", "exported"), ("webdataset", "exported/train")):
        assert stage_main("export", ["teachers", str(here / "data/shards/train"), "--to", form, "-o", str(here / output)]) == 0
    examples = fenced(ROOT / "docs" / "exporting.md", "python")
    assert len(examples) == 3
    assert all(len([line for line in example.splitlines() if line]) <= 10 for example in examples[:2])
    for example in examples:
        moved = "assert torch.isfinite(loss) and all(torch.isfinite(p).all() for g in optimizer.param_groups for p in g['params'])\n"
        steps = "assert max(state['step'] for state in optimizer.state.values()) >= 2, 'it took no steps'\n"
        block = "import sys; sys.modules['itm'] = sys.modules['pipelines'] = None\n" + example + moved + steps
        done = subprocess.run([sys.executable, "-c", block], cwd=here, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
