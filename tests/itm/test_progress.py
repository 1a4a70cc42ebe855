"""Where there is no terminal, progress is lines: when they come, and what they say. Times are given, so nothing here waits."""

from __future__ import annotations

import io
import json
import re
from datetime import datetime

import pytest

from itm import progress
from itm.progress import Progress, json_lines, over, span


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def said(out: io.StringIO) -> list[str]:
    """The lines without their time of day."""
    assert "\r" not in out.getvalue()
    return [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in out.getvalue().splitlines()]


def test_a_line_comes_every_so_many_seconds_and_at_the_end_with_the_time_left(clock: Clock) -> None:
    out = io.StringIO()
    with Progress("pack train", 2000, "image", every=10.0, out=out) as here:
        for _ in range(16):
            clock.now += 4.0
            here.update(125)
    assert said(out) == [
        "pack train: 375 of 2,000 images, 52 s left",
        "pack train: 750 of 2,000 images, 40 s left",
        "pack train: 1,125 of 2,000 images, 28 s left",
        "pack train: 1,500 of 2,000 images, 16 s left",
        "pack train: 1,875 of 2,000 images, 4 s left",
        "pack train: 2,000 of 2,000 images",
    ]


def test_what_was_done_before_does_not_count_for_the_pace(clock: Clock) -> None:
    out = io.StringIO()
    with Progress("score", 1000, "pair", initial=900, every=10.0, out=out) as here:
        clock.now += 10.0
        here.update(10)
        here.update(90)
    assert said(out) == ["score: 910 of 1,000 pairs, 1 min 30 s left", "score: 1,000 of 1,000 pairs"]


def test_a_caller_with_intervals_of_its_own_gets_a_line_each_and_its_start_is_no_pace(clock: Clock) -> None:
    out = io.StringIO()
    with Progress("train demo", 100, "step", every=0, out=out) as here:
        clock.now += 60.0  # workers start
        for done in (20, 40, 100):
            here.to(done, f"loss {done / 100:.4f}")
            clock.now += 5.0
    assert said(out) == [
        "train demo: 20 of 100 steps, loss 0.2000",
        "train demo: 40 of 100 steps, loss 0.4000, 15 s left",
        "train demo: 100 of 100 steps, loss 1.0000",
    ]


def test_a_time_left_that_the_caller_knows_is_not_said_twice(clock: Clock) -> None:
    out = io.StringIO()
    with Progress("train demo", 100, "step", every=0, out=out) as here:
        here.to(20, "loss 0.2000, 9 s left")
        clock.now += 5.0
        here.to(40, "loss 0.4000, 7 s left")
    assert said(out) == ["train demo: 20 of 100 steps, loss 0.2000, 9 s left", "train demo: 40 of 100 steps, loss 0.4000, 7 s left"]


def test_what_failed_has_no_last_line(clock: Clock) -> None:
    out = io.StringIO()
    with pytest.raises(ValueError, match="shard 3"), Progress("pack", 10, "image", out=out) as here:
        here.update(3)
        raise ValueError("shard 3")
    assert said(out) == []


def test_a_terminal_gets_a_bar() -> None:
    out = Terminal()
    with Progress("train demo", 4, "step", every=0, out=out) as here:
        here.to(4, "loss 0.5000")
    assert "\r" in out.getvalue() and "4/4" in out.getvalue() and "loss 0.5000" in out.getvalue()


def test_items_pass_unchanged_and_none_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(over(iter("abc"), "teach", 3, "shard")) == ["a", "b", "c"]
    assert capsys.readouterr().err.endswith("teach: 3 of 3 shards\n")
    assert list(over([], "teach", 0, "shard")) == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (360000, "100 h 00 min")],
)
def test_times_are_said_in_two_units_at_most(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_a_log_of_json_lines_has_the_step_and_its_values_and_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with json_lines("train"):
        print("batches: 3% of the pairs\nand more")
        with Progress("train demo", 4, "step", every=0) as here:
            here.to(2, "loss 0.5000", {"loss": 0.5, "lr": 0.1})
        print("no end", end="")
    out, err = ([json.loads(line) for line in text.splitlines()] for text in capsys.readouterr())
    assert [said["message"] for said in out] == ["batches: 3% of the pairs", "and more", "no end"]
    [step] = err
    assert (step["step"], step["of"], step["unit"], step["work"], step["loss"], step["lr"]) == (2, 4, "step", "train demo", 0.5, 0.1)
    assert all(said["stage"] == "train" and datetime.fromisoformat(said["time"]).tzinfo for said in (*out, step))
