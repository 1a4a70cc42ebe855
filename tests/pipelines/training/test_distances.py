"""ISD over the steps of a training: logged at each validation of method iais, and what the protocol finds on the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest

import itm
from itm.config import Part
from itm.evaluation.relations import isd_of_split
from itm.report.pictures import distances
from itm.tracking.history import history_of
from pipelines.train import train
from tests.support.noise_split import small_split
from tests.support.small_training import recipe

pytest_plugins = ["tests.support.registry_fixtures"]
UNITER = {"hidden": 16, "layers": 1, "heads": 2, "positions": 12, "region_dim": 3, "init_std": 0.25}
NAMES = [f"isd_{anchor}_{kind}" for anchor in ("L", "V") for kind in ("singular", "distributed")]


@pytest.mark.e2e
def test_distances_follow_the_steps_and_end_at_what_the_protocol_finds(registry: Path, tmp_path: Path) -> None:
    small_split(tmp_path / "shards", "train", regions=True)
    small_split(tmp_path / "shards", "val", shards=1, regions=True)
    data = {"image": "regions", "max_regions": 3}
    method = {"kind": "iais", "options": {"weight": 1.0, "ranking": {"hard_negatives": 2}}}
    chosen = recipe(tmp_path, data=data, steps=4, validate_every=2, checkpoint_every=4, log_every=2)
    chosen = chosen.model_copy(update={"model": Part(kind="uniter", options=UNITER), "method": Part(**method)})
    done = train(chosen)
    history = history_of(done["run_id"])
    assert history is not None
    assert [row["step"] for row in history.validations] == [2, 4]
    assert all(set(NAMES) <= row.keys() for row in history.validations)
    (best,) = [row for row in history.validations if row["step"] == done["best"]["step"]]
    wanted = isd_of_split(itm.load_matcher(f"{chosen.folder}/matcher"), f"{chosen.data.root}/val", annotated=False).metrics
    assert {name: best[name] for name in NAMES} == pytest.approx(wanted, rel=1e-5)
    drawn = distances(history.validations)
    assert drawn.count("<polyline") == 4 and "L, singular" in drawn
    assert distances([{"step": 1, "rsum": 3.0}]) == ""
