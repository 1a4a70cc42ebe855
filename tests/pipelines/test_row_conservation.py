"""Rows that go missing are an error that names shard and counts, also where Python leaves asserts out."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from itm.data.records import RowsLost, check_rows
from itm.data.sidecar import open_store, sidecar_uri, write_sidecar
from pipelines import teach as stage
from tests.support.small_teaching import pack, recipe, scenes

pytest_plugins = ["tests.support.teaching_fixtures"]
TEACH_AGAIN = """
import json, sys
assert False, "this child must run without asserts"
from itm.config import parse_recipe
from pipelines.teach import teach
teach(parse_recipe(json.loads(sys.argv[1])))
"""


def test_a_sum_that_fits_is_silent_and_one_that_does_not_names_place_and_counts():
    check_rows("00003.tar", 7, 5, 2)
    with pytest.raises(RowsLost, match=r"00003\.tar: 7 rows went in, 5 came out and 1 were rejected, which leaves 1 unaccounted for"):
        check_rows("00003.tar", 7, 5, 1)


def test_a_row_that_moved_to_another_shard_is_found_although_the_sum_of_the_store_fits(here):
    """Without asserts, as `python -O` runs: the first sidecar lost a row, the second has one too many."""
    pack(here, scenes(8))
    wanted = recipe(here, {"kind": "statistics"})
    store = open_store(stage.teach(wanted)["image"])
    for shard, rows in (("00000.tar", [0, 1, 2]), ("00001.tar", [0, 1, 2, 3, 3])):
        held = store.sidecar(shard)
        keys, vectors = [held.keys[r] for r in rows], np.array(held.vectors[rows], np.float32)
        write_sidecar(sidecar_uri(store.uri, shard), replace(held.header), keys, vectors)
    child = subprocess.run([sys.executable, "-O", "-c", TEACH_AGAIN, wanted.model_dump_json()], capture_output=True, text=True, check=False)
    assert child.returncode == 1
    assert "RowsLost: " in child.stderr
    assert "00000.arrow: 4 rows went in, 3 came out and 0 were rejected" in child.stderr
