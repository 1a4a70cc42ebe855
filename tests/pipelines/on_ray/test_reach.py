"""A folder that only some machines see is refused. The nodes here share their disk, so a look of one node is made blind by its root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.on_ray import reach


def test_a_session_of_one_process_needs_no_look(ray_local, tmp_path: Path):
    with reach.shared({"output": str(tmp_path / "not-there")}) as tokens:
        assert tokens == ()
    assert not (tmp_path / "not-there").exists()


def test_who_joins_later_looks_for_himself(tmp_path: Path):
    (tmp_path / ".itm-reach.tmp-x").write_text("")
    tokens = (("output", str(tmp_path / ".itm-reach.tmp-x")),)
    assert reach.confirmed(tokens, max, 1, 2) == 2
    os.remove(tmp_path / ".itm-reach.tmp-x")
    with pytest.raises(ValueError, match=rf"output={tmp_path} is not shared: .* Say output=s3://bucket"):
        reach.confirmed(tokens, max, 1, 2)
