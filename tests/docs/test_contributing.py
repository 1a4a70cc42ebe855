"""The parts that CONTRIBUTING.md shows are parts: written to a module as they stand, named by import path, they train and judge."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from itm.evaluation import PROTOCOLS
from itm.evaluation.dataset import names_of
from itm.evaluation.protocols import Scored, run_protocol
from itm.kinds import build_part, find_part
from itm.matchers import MATCHERS
from itm.methods import METHODS
from itm.teachers import TEACHERS
from tests.support import ROOT
from tests.support.documents import fenced
from tests.support.every_matcher import WORDS, batch_of

PAGE = ROOT / "CONTRIBUTING.md"


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that holds every Python block of the page."""
    blocks = "\n\n".join(fenced(PAGE, "python"))
    assert blocks.count("\nclass ") >= 7
    (tmp_path / "contributing_shown.py").write_text(blocks)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "contributing_shown"
    sys.modules.pop("contributing_shown", None)


def test_matcher_encoder_pooling_and_term_train_together(shown: str) -> None:
    conv = {"kind": "conv", "image_size": 16, "hidden": 8}
    models = [
        (f"{shown}:Plain", {"image": conv, "text": {"kind": f"{shown}:Bag", "width": 8}, "width": 8}),
        ("dual", {"image": conv, "text": {"kind": f"{shown}:Bag"}, "width": 8, "pooling": {"image": {"kind": f"{shown}:Largest"}}}),
    ]
    batch = batch_of(4)
    for kind, options in models:
        matcher = build_part(MATCHERS, kind, options, "model", vocab_size=WORDS)
        again = build_part(MATCHERS, kind, matcher.options, "model", vocab_size=WORDS)
        again.load_state_dict(matcher.state_dict())
        for method in ({"loss": f"{shown}:Squared", "weight": 2.0}, {"loss": "sigmoid"}):
            losses = build_part(METHODS, "matching", method, "method", matcher=matcher)(batch)
            sum(losses.values()).backward()
        silent = [name for name, p in matcher.named_parameters() if p.grad is None]
        assert not [name for name in silent if not name.startswith("image_encoder.linear")], silent
        losses = build_part(METHODS, "cusa", {f"{shown}:Squared": {"weight": 0.5}}, "method", matcher=matcher)(batch)
        assert {f"{shown}:Squared", "csa", "usa"} == set(losses)


def test_teacher_and_protocol_do_what_they_say(shown: str) -> None:
    teacher = build_part(TEACHERS, f"{shown}:Letters", {}, "teacher")
    assert teacher.embed([b"abba"]).tolist()[0][:3] == [3.0, 3.0, 1.0]
    scored = Scored(torch.tensor([[0.9, 0.3], [0.2, 0.7]]), names_of(2, torch.tensor([0, 1])))
    assert run_protocol(f"{shown}:MeanMargin", scored).metrics["t2i_margin"] == pytest.approx((0.7 + 0.4) / 2)


def test_the_files_and_lines_of_the_five_extensions_are_there() -> None:
    text = PAGE.read_text()
    for path in re.findall(r"\| `((?:itm|tests)/[\w/]+\.py)` \|", text):
        assert (ROOT / path).exists(), path
    for kind, where in re.findall(r"\| `\"\w+\": \"([\w.:]+)\",` in `(\w+)` \|", text):
        module, _, name = kind.partition(":")
        assert f'"{kind}"' in "".join(p.read_text() for p in (ROOT / "itm").rglob("*.py") if f"{where}: Kinds" in p.read_text())
        assert name in (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert find_part(PROTOCOLS, "auto", "protocol")
