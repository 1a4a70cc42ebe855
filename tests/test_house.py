"""Holds the house: floors (imports point down), doors (who may import what), no circles, sizes, and an importable mlflow."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path

import pytest

from tests.support import ROOT

FLOORS = {
    "itm.types": 0,
    "itm.arguments": 0,
    "itm.rows": -0.5,  # what the nouns have in common
    "itm.choices": 0,
    "itm.sections": 0,
    "itm.config": 0.5,  # it asks itm.kinds which packages a recipe names
    "itm.kinds": 0,
    "itm.device": 0,
    "itm.distributed": 0,
    "itm.precision": 0,
    "itm.extras": 0,
    "itm.packaged": 0,
    "itm.environment": 0,
    "itm.progress": 0,
    "itm.data": 1,
    "itm.losses": 1,
    "itm.matchers": 2,
    "itm.methods": 3,
    "itm.training": 3,
    "itm.importers": 3,
    "itm.exporters": 3,
    "itm.tracking": 3,
    "itm": 3.5,  # the front door, `itm.load_matcher`
    "itm.evaluation": 4,
    "itm.teachers": 5,
    "itm.retrieval": 5,
    "itm.report": 6,
    "itm.benchmarks": 6,
    "itm.pyfunc": 6,
    "pipelines.on_ray": 7,
    "pipelines.training": 7.5,  # these stand on the session and the streams of the one before
    "pipelines.teaching": 7.5,
    "pipelines.featuring": 7.5,
    "pipelines.indexing": 7.5,
    "pipelines.evaluating": 7.5,
    "pipelines.reporting": 7.5,
    "pipelines.serving": 7.5,
    "pipelines.sweeping": 7.7,  # a trial is a training
    "pipelines": 8,
    "cluster": 9,
}
DOORS = {
    "ray": ("pipelines/", "cluster/"),
    "mlflow": ("itm/tracking/", "itm/pyfunc.py"),
    "webdataset": ("itm/data/shards.py",),
    "transformers": (
        "itm/matchers/encoders/",
        "itm/matchers/joint/",
        "itm/importers/",
        "itm/exporters/",
        "itm/teachers/",
        "itm/data/text.py",
    ),
    "onnx": ("itm/exporters/",),
    "datasets": ("itm/data/sources/hub.py",),
    "peft": ("itm/matchers/encoders/",),
    "faiss": ("itm/retrieval/",),
}
MAX_FILE, MAX_CLASS, MAX_FUNCTION, MAX_PARAMETERS = 400, 120, 60, 7
SOURCES = sorted(p for folder in ("itm", "pipelines", "cluster") for p in (ROOT / folder).rglob("*.py"))
NAMES = [str(p.relative_to(ROOT)) for p in SOURCES]


def module_of(path: Path, root: Path = ROOT) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def room_of(module: str) -> str | None:
    """The longest room that holds the module; `itm` itself is one file."""
    rooms = [room for room in FLOORS if module == room or (module.startswith(room + ".") and room != "itm")]
    return max(rooms, key=len, default=None)


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Full names: `import a.b` gives a.b, `from a import b` gives a.b, whatever b is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reached_by_name(tree: ast.AST) -> Iterator[str]:
    """Modules that the code reaches without an import: a kind's `module:Name`, a module's name, or the file itself."""
    docstrings = {ast.get_docstring(n, clean=False) for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or node.value in docstrings:
            continue
        text = node.value
        if re.fullmatch(r"(itm|pipelines)(\.\w+)+(:\w+)?", text):
            yield text.partition(":")[0]
        elif re.fullmatch(r"[\w/]+\.py", text):
            yield from (module for module, path in MODULES.items() if str(path).endswith("/" + text))


def own_modules(names: Iterable[str]) -> set[str]:
    """The modules of this project behind full names."""
    found = set()
    for name in names:
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name in MODULES:
            found.add(name)
    return found


def upward(own: str, tree: ast.AST) -> list[str]:
    """What a module takes from its own floor's other rooms, or from above."""
    room = room_of(own)
    assert room is not None, f"{own} is in no room of the plan"
    taken = own_modules((*imports_of(tree), *reached_by_name(tree)))
    others = {name: other for name in taken if (other := room_of(name)) != room}
    return [name for name, other in others.items() if other is None or FLOORS[other] >= FLOORS[room]]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, or []."""
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def large(path: Path) -> list[str]:
    """What is larger than a reader can see whole."""
    text = path.read_text()
    found = [f"{path.name} has {text.count(chr(10))} lines"] * (text.count("\n") > MAX_FILE)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        size = (node.end_lineno or 0) - node.lineno + 1
        if size > (MAX_CLASS if isinstance(node, ast.ClassDef) else MAX_FUNCTION):
            found.append(f"{path.name}: {node.name} has {size} lines")
        if not isinstance(node, ast.ClassDef):
            arguments = [a for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
            if len(arguments) > MAX_PARAMETERS:
                found.append(f"{path.name}: {node.name} (line {node.lineno}) has {len(arguments)} parameters")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_imports_point_to_lower_floors(path: Path):
    assert not upward(module_of(path), ast.parse(path.read_text()))


@pytest.mark.parametrize(
    ("own", "code"),
    [
        ("itm.data.tar", "import itm"),
        ("itm.losses.triplet", "from itm.data import files"),
        ("itm.tracking.registry", "CODE = Path(itm.__file__).parent / 'pyfunc.py'"),
        ("itm.matchers.dual", "TABLE = {'sts': 'itm.evaluation.sentence_pairs:sts'}"),
        ("itm.training.step", "def late():\n    from pipelines import train"),
    ],
)
def test_a_planted_import_that_points_upward_is_found(own: str, code: str):
    assert upward(own, ast.parse(code))


def test_no_file_is_in_a_circle():
    graph = {name: own_modules(imports_of(ast.parse(path.read_text()))) - {name} for name, path in MODULES.items()}
    assert not circle(graph)


def test_a_planted_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_each_foreign_package_has_one_door(path: Path):
    relative = str(path.relative_to(ROOT))
    for name in imports_of(ast.parse(path.read_text())):
        doors = DOORS.get(name.split(".")[0])
        assert doors is None or relative.startswith(doors), f"{relative} imports {name}; only {doors} may"


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_files_classes_functions_and_parameter_lists_stay_small(path: Path):
    assert not large(path)
    assert path.stem not in {"utils", "common", "helpers"}


def test_what_is_planted_too_large_is_found(tmp_path: Path):
    body = "\n".join(f"    x{k} = {k}" for k in range(121))
    method = "    def __init__(self, a, b, c, d, e, f, g, h): ..."
    (tmp_path / "big.py").write_text(f"class C:\n{body}\n\n\ndef f():\n{body}\n\n\nclass D:\n{method}\n")
    assert large(tmp_path / "big.py") == [
        "big.py: C has 122 lines",
        "big.py: f has 122 lines",
        "big.py: __init__ (line 250) has 8 parameters",
    ]


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_assert_only_narrows_a_type(path: Path):
    """What guards data must raise: `python -O` leaves asserts out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assert):
            assert re.fullmatch(r"(isinstance\(.+\)|[\w.]+ is not None)( and [\w.]+ is not None)*", ast.unparse(node.test)), node.lineno


def test_no_test_imports_another_test():
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for name in imports_of(ast.parse(path.read_text())):
            assert not re.match(r"tests\.(?!support\b)", name), f"{path.name} imports {name}: share it through tests/support"


def test_nothing_importable_lies_in_the_mlflow_folder():
    assert not [*(ROOT / "mlflow").rglob("*.py"), *(ROOT / "mlflow").rglob("*.pyi")]


def test_mlflow_is_the_installed_package_and_not_the_folder():
    import mlflow

    assert mlflow.__file__ is not None
    assert mlflow.__version__ == importlib.metadata.version("mlflow")


def test_every_named_part_exists():
    from itm.data.sources import SOURCES as sources
    from itm.kinds import find_part
    from itm.matchers import MATCHERS
    from itm.matchers.encoders.build import IMAGE_ENCODERS, TEXT_ENCODERS
    from itm.methods import METHODS
    from itm.teachers import TEACHERS

    for table in (sources, METHODS, MATCHERS, IMAGE_ENCODERS, TEXT_ENCODERS, TEACHERS):
        for kind in table:
            module, _, name = table.base.partition(":")
            assert issubclass(find_part(table, kind, "part"), getattr(import_module(module), name))
