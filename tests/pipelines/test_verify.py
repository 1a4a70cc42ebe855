"""Verifying a store: equal teachers pass within the rounding of the stored type, anything else fails loudly."""

from __future__ import annotations

import numpy as np
import pytest

from itm.data import sidecar as s
from pipelines.cli import stage_main
from pipelines.teaching import driver as stage
from pipelines.teaching.recompute import TOLERANCE, verify
from tests.support.small_teaching import SHUFFLED, SHUFFLED_TEXT, pack, recipe, scenes

pytest_plugins = ["tests.support.teaching_fixtures"]


STATISTICS = {"kind": "statistics", "options": {"size": 64}}


def typed(root, dtype, image=STATISTICS, text=None):
    wanted = recipe(root, image, text)
    return wanted.model_copy(update={"teachers": wanted.teachers.model_copy(update={"dtype": dtype})})


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_a_fresh_store_agrees_with_its_live_teacher(here, dtype):
    pack(here, scenes(9))
    wanted = typed(here, dtype)
    stage.teach(wanted)
    (result,) = verify(wanted, rows=6, seed=1)
    assert result.ok
    assert result.rows == 6
    assert (result.max_dS == 0) == (result.max_dv == 0)
    assert result.max_dS < TOLERANCE[dtype] / 2
    assert dtype == "fp32" or result.max_dv > 1e-6, "it did compare with what is stored"


def test_rows_in_another_order_are_found_out(here, capsys):
    pack(here, scenes(8))
    wanted = typed(here, "fp16")
    uri = stage.teach(wanted)["image"]
    rows = s.open_store(uri).sidecar("00000.tar")
    s.write_sidecar(rows.uri, rows.header, rows.keys, np.roll(rows.vectors, 1, axis=0))
    assert not verify(wanted, rows=8)[0].ok
    (here / "r.json").write_text(wanted.model_dump_json())
    assert stage_main("verify", ["-c", str(here / "r.json"), "--rows", "8"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_shuffled_store_is_checked_against_its_permutation(here):
    pack(here, scenes(9))
    wanted = recipe(here, SHUFFLED, SHUFFLED_TEXT)
    uri = stage.teach(wanted)["image"]
    assert [r.ok for r in verify(wanted, rows=9)] == [True, True]
    rows = s.open_store(uri).sidecar("00001.tar")
    s.write_sidecar(rows.uri, rows.header, rows.keys, np.roll(rows.vectors, 1, axis=0))
    assert [r.ok for r in verify(wanted, rows=9)] == [False, True]


def test_a_missing_store_names_the_remedy(here):
    pack(here, scenes(4))
    with pytest.raises(ValueError, match=r"no soft-label store.*itm teach"):
        verify(typed(here, "fp16"))


def test_a_teacher_that_has_changed_since_is_refused(here, monkeypatch):
    from itm.teachers.image import StatisticsTeacher

    pack(here, scenes(4))
    wanted = typed(here, "fp16")
    stage.teach(wanted)
    made = StatisticsTeacher.__init__
    monkeypatch.setattr(StatisticsTeacher, "__init__", lambda self, size: (made(self, size), self.identity.update(revision="2"))[0])
    with pytest.raises(ValueError, match=r"no longer that of .*itm teach"):
        verify(wanted)
