"""Named parts: a room's table maps a kind to `module:Class`, imported on first use so that unused ones cost nothing.

A kind may also be an import path, `package.module:Class`: a part of one's own, which needs no fork. Whoever writes a recipe chooses its
packages himself. What a matcher folder or a registered model names was chosen by whoever made it: `check_allowed` comes before the import.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Generic, TypeVar, Unpack, get_args, get_origin, get_type_hints

T = TypeVar("T")


class MissingPackage(ValueError):
    """A part is of a package that is not installed here."""


IMPORT_PATH = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
_BY_PATH: set[str] = set()  # the import paths of parts that this process has loaded: their packages go to Ray workers


class Kinds(dict[str, str], Generic[T]):
    """kind -> `module:Class`. `base` is written the same way; a part that is reached by an import path must be a subclass of it."""

    def __init__(self, base: str, kinds: Mapping[str, str]) -> None:
        super().__init__(kinds)
        self.base = base


def find_part(table: Kinds[T], kind: str, what: str) -> type[T]:
    """The class behind `kind`, a name in the table or an import path.

    Raises ValueError naming the near kind, the package that is not installed, the attribute that is missing or the base that is wanted.
    """
    if ":" in str(kind):
        return _imported(kind, table.base, what)
    if kind not in table:
        near = difflib.get_close_matches(str(kind), table, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(table)}, or package.module:Name for one of your own"
        raise ValueError(f"unknown {what} {kind!r}; {hint}")
    module, _, name = table[kind].partition(":")
    found: type[T] = getattr(import_module(module), name)
    return found


def build_part(table: Kinds[T], kind: str, options: Mapping[str, object], what: str, **given: object) -> T:
    """Build `kind` from recipe `options` plus what the caller gives. Raises ValueError for an unknown or missing option."""
    part: Callable[..., T] = find_part(table, kind, what)
    known, takes_any = options_of(part)
    if not takes_any:
        refuse_unknown(options, known, f"{what} {kind!r}")
    try:
        inspect.signature(part).bind(**given, **options)
    except TypeError as error:
        raise ValueError(f"{what} {kind!r}: {error}") from None
    return part(**given, **options)


def refuse_unknown(options: Iterable[str], known: Collection[str], what: str) -> None:
    """Raises ValueError naming the first option that is not known, and the near one."""
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{what} has no option {option!r}; {hint}")


def options_of(part: Callable[..., object]) -> tuple[list[str], bool]:
    """Names of what a part takes, the keys of an unpacked TypedDict (`**options: Unpack[...]`) included; whether it takes any other too."""
    parameters = inspect.signature(part).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    for rest in (p for p in parameters if p.kind is p.VAR_KEYWORD):
        if "Unpack" not in str(rest.annotation):  # annotations that need not be looked up may name what was never imported
            return names, True
        hint = get_type_hints(part.__init__ if inspect.isclass(part) else part).get(rest.name)
        if get_origin(hint) is not Unpack:
            return names, True
        names += get_type_hints(get_args(hint)[0])
    return names, False


def _imported(path: str, base: str, what: str) -> type:
    parsed = IMPORT_PATH.fullmatch(path)
    if not parsed:
        raise ValueError(f"{what} {path!r} is no import path; write package.module:Name")
    name, attribute = parsed.groups()
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"{what} {path!r} imports {error.name!r}, which is not installed: pip install it") from error
        package = name.partition(".")[0]
        if error.name != package:
            raise MissingPackage(f"{what} {path!r}: the package {package!r} that is installed here has no module {error.name!r}") from None
        raise MissingPackage(
            f"{what} {path!r} needs the package {package!r}, which is not installed here: install it, or put its folder on PYTHONPATH"
        ) from None
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        raise ValueError(f"{what} {path!r}: {name} has no {attribute!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    part = _subclass(getattr(module, attribute), path, base, what)
    _BY_PATH.add(path)
    return part


def _subclass(part: object, path: str, base: str, what: str) -> type:
    module, _, name = base.partition(":")
    if not (isinstance(part, type) and issubclass(part, getattr(import_module(module), name))):
        raise ValueError(f"{what} {path!r} is not a subclass of {module}.{name}, as every {what} must be")
    return part


# --- who may name a package -------------------------------------------------------------------------------------------------------------


def import_paths(choices: object, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in nested mappings and sequences that reads as an import path, whatever it is meant for."""
    if isinstance(choices, str):
        if IMPORT_PATH.fullmatch(choices):
            yield key, choices
    elif isinstance(choices, Mapping):
        for name, value in choices.items():
            yield from import_paths(name, key)
            yield from import_paths(value, f"{key}.{name}" if key else str(name))
    elif isinstance(choices, Iterable):
        for number, value in enumerate(choices):
            yield from import_paths(value, f"{key}.{number}" if key else str(number))


def packages_of(choices: object) -> list[str]:
    """The packages whose parts nested choices name, sorted."""
    return sorted({path.partition(":")[0].partition(".")[0] for _, path in import_paths(choices)})


def check_allowed(choices: object, allow: Iterable[str], where: str) -> None:
    """Raises ValueError when `choices`, read at `where`, name a part of a package that is not in `allow`. Nothing is imported.

    `allow` holds packages, or modules of them: "acme" allows acme.parts:X, and so does "acme.parts".
    """
    allowed = [allow] if isinstance(allow, str) else list(allow)
    for key, path in import_paths(choices):
        module = path.partition(":")[0]
        if not any(f"{module}.".startswith(f"{name}.") for name in allowed if name):
            package = module.partition(".")[0]
            raise ValueError(
                f"{where} names {key}={path!r}, code of the package {package!r}: it is imported only if you allow it, "
                f"by allow=[{package!r}] or --allow {package}"
            )


# --- where a loaded part comes from -----------------------------------------------------------------------------------------------------


def origins(choices: object) -> dict[str, str]:
    """Import path -> `package version, sha256 <12 digits of its source file>`, of the parts in nested `choices` that are loaded."""
    return {path: _origin(path, part) for path, part in _loaded(choices)}


def requirements(choices: object) -> list[str]:
    """`distribution==version` of the packages of the loaded parts in `choices`, of those that pip could install elsewhere."""
    found = [_distribution(path) for path, _ in _loaded(choices)]
    return sorted({f"{d.name}=={d.version}" for d in found if d is not None and not _from_folder(d)})


def local_packages(choices: object = None) -> list[Path]:
    """Folder (or file) of the packages that no package index could give: of the loaded parts in `choices`; unset = of all that this process
    has loaded by an import path."""
    places = set()
    for path, _ in _loaded(_BY_PATH if choices is None else choices):
        found = _distribution(path)
        if found is None or _from_folder(found):
            package = sys.modules[path.partition(":")[0].partition(".")[0]]
            folders = list(getattr(package, "__path__", []))
            places.add(Path(folders[0] if folders else str(package.__file__)))
    return sorted(places)


def _loaded(choices: object) -> Iterator[tuple[str, type]]:
    """Import path and class of the parts in nested `choices` whose modules are imported."""
    for _, path in import_paths(choices):
        module, _, name = path.partition(":")
        if isinstance(part := getattr(sys.modules.get(module), name, None), type):
            yield path, part


def _origin(path: str, part: type) -> str:
    file = sys.modules[part.__module__].__file__
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file else "unknown"
    package, found = path.partition(":")[0].partition(".")[0], _distribution(path)
    return f"{f'{found.name} {found.version}' if found else f'{package} (no version)'}, sha256 {digest}"


def _distribution(path: str) -> importlib.metadata.Distribution | None:
    """What pip installed the module of an import path from; None for one that merely lies on the path of modules."""
    module = path.partition(":")[0]
    file = Path(str(sys.modules[module].__file__))
    for name in _distributions(tuple(sys.path)).get(module.partition(".")[0], []):
        found = importlib.metadata.distribution(name)
        own = (Path(str(found.locate_file(f))) for f in found.files or [] if f.name == file.name)
        if _from_folder(found) or any(place.resolve() == file.resolve() for place in own):
            return found
    return None


@lru_cache(maxsize=1)
def _distributions(path: tuple[str, ...]) -> Mapping[str, list[str]]:
    """Package -> what installed it. Reading all that is installed takes a second or more, so it is read once for a `sys.path`."""
    return importlib.metadata.packages_distributions()


def _from_folder(distribution: importlib.metadata.Distribution) -> bool:
    """Installed from a folder of this machine (`pip install .` or `-e .`), which pip finds nowhere else."""
    return '"dir_info"' in (distribution.read_text("direct_url.json") or "")
