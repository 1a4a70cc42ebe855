"""Runs whose driver was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from itm.tracking.drivers import ENDED, is_dead
from itm.tracking.runs import Tracker, client
from tests.support import ROOT

pytest_plugins = ["tests.support.registry_fixtures"]
pytestmark = pytest.mark.e2e


def test_a_run_whose_driver_was_killed_is_ended_when_the_next_one_starts_and_goes_on_when_taken_up(registry: Path):
    code = "from itm.tracking.runs import Tracker\nprint(Tracker.start('tests', 'victim').run_id, flush=True)\ninput()"
    command = [sys.executable, "-c", code]
    victim = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=-1, stdout=-1, text=True)
    assert victim.stdout is not None
    run_id = victim.stdout.readline().strip()
    with Tracker.start("tests", "while it lives") as living:
        pass
    assert client().get_run(run_id).info.status == "RUNNING"
    assert not is_dead(client().get_run(run_id))
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert is_dead(client().get_run(run_id))
    with Tracker.start("tests", "next"):
        seen = client().get_run(run_id)
        assert (seen.info.status, "died without a word" in seen.data.tags[ENDED]) == ("KILLED", True)
        with Tracker.start("tests", "beside it"):
            pass
    assert client().get_run(living.run_id).info.status == "FINISHED"
    with Tracker(run_id, living.uri, owner=True, system_metrics=False):
        assert client().get_run(run_id).info.status == "RUNNING"
        assert not is_dead(client().get_run(run_id))
    assert client().get_run(run_id).info.status == "FINISHED"
