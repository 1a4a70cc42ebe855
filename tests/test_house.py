"""Holds the house: floors (imports point down), doors (who may import what), sizes, and an importable mlflow."""

from __future__ import annotations

import ast
import importlib.metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "itm.types": 0,
    "itm.config": 1,
    "itm.distributed": 1,
    "itm.parts": 1,
    "itm.lineage": 1,
    "itm.precision": 1,
    "itm.models": 2,
    "itm.losses": 2,
    "itm.data": 2,
    "itm.methods": 3,
    "itm.teachers": 3,
    "itm.folder": 3,
    "itm.training": 4,
    "itm.evaluation": 4,
    "itm.registry": 4,
    "pipelines": 5,
    "cluster": 6,
}
DOORS = {
    "ray": ("pipelines/", "cluster/"),
    "mlflow": ("itm/registry.py", "pipelines/pyfunc_model.py"),
    "webdataset": ("itm/data/shards.py",),
    "transformers": ("itm/models/", "itm/teachers/", "itm/data/text.py"),
}
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 400, 60, 7
SOURCES = sorted(p for folder in ("itm", "pipelines", "cluster") for p in (ROOT / folder).rglob("*.py"))
NAMES = [str(p.relative_to(ROOT)) for p in SOURCES]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str | None:
    return next((room for room in FLOORS if module == room or module.startswith(room + ".")), None)


def imports_of(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def functions_of(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_imports_point_to_lower_floors(path: Path):
    own = room_of(module_of(path))
    for name in imports_of(ast.parse(path.read_text())):
        other = room_of(name)
        if own and other and own != other:
            assert FLOORS[other] < FLOORS[own], f"{path.name} ({own}) imports {name}, which is not on a lower floor"


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_each_foreign_package_has_one_door(path: Path):
    relative = str(path.relative_to(ROOT))
    for name in imports_of(ast.parse(path.read_text())):
        doors = DOORS.get(name.split(".")[0])
        assert doors is None or relative.startswith(doors), f"{relative} imports {name}; only {doors} may"


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_files_functions_and_parameter_lists_stay_small(path: Path):
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE
    assert path.stem not in {"utils", "common", "helpers"}
    for function in functions_of(ast.parse(text)):
        size = (function.end_lineno or 0) - function.lineno + 1
        assert size <= MAX_FUNCTION, f"{function.name} has {size} lines"
        arguments = [
            a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs) if a.arg not in ("self", "cls")
        ]
        if function.name != "__init__":
            assert len(arguments) <= MAX_PARAMETERS, f"{function.name} has {len(arguments)} parameters"


def test_nothing_importable_lies_in_the_mlflow_folder():
    assert not [*(ROOT / "mlflow").rglob("*.py"), *(ROOT / "mlflow").rglob("*.pyi")]


def test_mlflow_is_the_installed_package_and_not_the_folder():
    import mlflow

    assert mlflow.__file__ is not None
    assert mlflow.__version__ == importlib.metadata.version("mlflow")


def test_every_named_part_exists():
    from itm.data.sources import SOURCES as sources
    from itm.methods import METHODS
    from itm.models import MODELS
    from itm.models.encoders import IMAGE_ENCODERS, TEXT_ENCODERS
    from itm.parts import find_part
    from itm.teachers import TEACHERS

    for table in (sources, METHODS, MODELS, IMAGE_ENCODERS, TEXT_ENCODERS, TEACHERS):
        for kind in table:
            assert callable(find_part(table, kind, "part"))
