"""The whole walk on machines that share no disk: what a user without a checkout submits runs on nodes without one."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.support.lab.cluster import Lab, lab, lab_recipe
from tests.support.lab.machines import missing
from tests.support.s3_server import BUCKET

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(why := missing()), reason=f"NOT TESTED: machines that share no disk; {why}")]


def walk(there: Lab) -> dict[str, str]:
    """Every stage, submitted; what each printed."""
    there.write_recipe(lab_recipe())
    said = {stage: there.submit(stage) for stage in ("pack", "teach", "train", "evaluate", "register")}
    said["report"] = there.submit("report")
    where = ["--model", "models:/lab@champion", "--shards", f"s3://{BUCKET}/shards/test", "-k", "3"]
    return said | {"search": there.search("a red circle", *where)}


def test_the_whole_walk_by_submit_from_a_machine_that_has_only_the_wheel(tmp_path: Path) -> None:
    begin = time.monotonic()
    with lab(tmp_path) as there:
        assert "No module" in there.head.run(["python", "-c", "import itm"], check=False), "a node has the code by itself"
        said = walk(there)
        whole = time.monotonic() - begin
        kept = there.objects()
    print(f"whole walk: {whole:.0f} s", flush=True)
    assert json.loads(kept["runs/lab/run.json"])["steps"] == 20
    assert {"runs/lab/matcher/model.safetensors", "runs/lab/report.html"} <= kept.keys()
    assert len([name for name in kept if name.startswith("shards/") and name.endswith(".tar")]) == 5 + 1 + 2
    assert len(said["search"].strip().splitlines()) >= 4, said["search"]
