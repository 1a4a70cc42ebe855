"""A package of an extra that is not installed is named with the pip line, wherever it is first needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from itm.extras import MissingExtra, needed_by
from tests.support import ROOT

# A fresh process in which some packages are as if they were not installed.
WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def without(packages: tuple[str, ...], code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT.format(packages=packages) + code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "HOME": str(folder), "PATH": "/usr/bin:/bin"},
        check=False,
    )


@pytest.mark.parametrize("arguments", [["train", "-c", "demo"], ["register", "-c", "demo"]])
def test_a_stage_names_the_extra_in_one_line(arguments: list[str], tmp_path: Path):
    done = without(("ray", "mlflow"), f"from pipelines.cli import main; sys.exit(main({arguments}))", tmp_path)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("itm ")]
    assert lines == [f"itm {arguments[0]} needs mlflow: pip install 'itm-pipeline[pipeline]'"]
    assert "Traceback" not in done.stderr


def test_packing_without_ray_names_the_extra_of_the_pipeline(tmp_path: Path):
    few = ["-c", "demo", *(f"data.source.options.n_{split}=2" for split in ("train", "val", "test"))]
    done = without(("ray",), f"from pipelines.cli import main; sys.exit(main({['pack', *few]}))", tmp_path)
    assert done.stderr.splitlines()[-1] == "itm pack needs ray: pip install 'itm-pipeline[pipeline]'"


def test_loading_from_a_registry_without_mlflow_names_the_extra_of_tracking(tmp_path: Path):
    done = without(("mlflow",), "import itm; itm.load_matcher('models:/itm-matcher@champion')", tmp_path)
    assert done.stderr.splitlines()[-1] == (
        "itm.extras.MissingExtra: load_matcher('models:/itm-matcher@champion') needs mlflow: pip install 'itm-pipeline[tracking]'"
    )


def test_an_object_store_without_boto3_names_the_extra_of_s3():
    line = r"itm register needs boto3: pip install 'itm-pipeline\[s3\]'"
    with pytest.raises(MissingExtra, match=line), needed_by("itm register", extra="pipeline"):
        raise ModuleNotFoundError("No module named 'boto3'", name="boto3")


def test_a_missing_package_of_no_extra_stays_as_it_is():
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_package'") as error, needed_by("x", extra="pipeline"):
        import no_such_package  # noqa: F401
    assert not isinstance(error.value, MissingExtra)
