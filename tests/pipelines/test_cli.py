"""What the command line says and how soon: help needs none of the large packages, an unknown stage names the near one."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import itm
from pipelines import cli
from pipelines.cli import GROUPS, STAGES, main, module_of
from tests.support import ROOT

LARGE = ("torch", "ray", "transformers", "mlflow")
# Runs in a fresh process: what is imported when the code is done, also when argparse ends it.
REPORT = "import atexit, sys; atexit.register(lambda: print('LARGE', *[m for m in {large} if m in sys.modules]));"


def imported_by(code: str) -> tuple[list[str], str]:
    """(the large packages that a fresh process has imported after `code`, what it printed before)."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", REPORT.format(large=LARGE) + code], capture_output=True, text=True, cwd=ROOT, check=True, timeout=120
    )
    said, _, large = done.stdout.rpartition("LARGE")
    print(f"{code}: {time.perf_counter() - began:.2f} s")
    return large.split(), said


def test_the_report_of_imports_sees_torch():
    assert imported_by("import torch")[0] == ["torch"]


def test_importing_itm_draws_in_no_large_package():
    assert imported_by("import itm; itm.load_matcher, itm.__version__")[0] == []


@pytest.mark.parametrize("arguments", [[], *([stage] for stage in STAGES)], ids=["itm", *STAGES])
def test_help_draws_in_no_large_package(arguments: list[str]):
    large, said = imported_by(f"from pipelines.cli import main; main({[*arguments, '--help']})")
    assert large == []
    assert said.startswith("usage: itm")


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_runs_as_a_module_too(stage: str):
    done = subprocess.run([sys.executable, "-m", module_of(stage), "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith(f"usage: itm {stage} ")


def test_help_groups_the_stages_by_what_a_person_does_one_line_each(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    groups = [line.removesuffix(":") for line in lines if line.removesuffix(":") in GROUPS]
    assert groups == ["look", "prepare", "teach", "train", "judge", "use", "cluster"]
    assert sorted(line.split()[0] for line in lines if line.startswith("  ") and line.split()[0] in STAGES) == sorted(STAGES)
    assert {stage.group for stage in STAGES.values()} == set(GROUPS)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"itm {itm.__version__}\n"


@pytest.mark.parametrize(("typed", "said"), [("trian", "did you mean 'train'"), ("xyzzy", "known: init, demo, recipes")])
def test_an_unknown_stage_names_the_near_one(typed: str, said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main([typed])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_module_is_behind_one_stage():
    modules = [module_of(stage) for stage in STAGES]
    assert len(set(modules)) == len(modules)
    assert cli.RECIPES.is_dir()
