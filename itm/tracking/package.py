"""What a registered model consists of: a matcher folder, the code that serves it, and what must be installed. No pickle."""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from itm.kinds import local_packages, requirements
from itm.tracking.addresses import folder_uri

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

REQUIREMENTS = ("torch", "transformers", "numpy", "pyarrow", "pillow", "simplejpeg", "safetensors", "pydantic", "pyyaml")

EXAMPLE = ["a red circle left of a blue square", "two dogs run over a lawn"]


def save_package(target: Path, folder: Path, code: Path, run_id: str, model_id: str) -> Path:
    """Write the MLflow model `target` around the matcher folder; `code` is the file of the pyfunc model. Returns `target`.

    A package of the user's own that the matcher names becomes a requirement at the version that is loaded here, or travels as code where
    pip could not find it elsewhere.
    """
    config = json.loads((folder / "config.json").read_text())
    own = [f"{part}=={importlib.metadata.version(part).partition('+')[0]}" for part in REQUIREMENTS]
    with warnings.catch_warnings(action="ignore"):
        import mlflow.pyfunc  # slow and full of warnings about its own type hints
        from mlflow.models import Model

        mlflow.pyfunc.save_model(
            str(target),
            python_model=str(code),
            artifacts={"matcher": folder_uri(folder)},
            code_paths=[str(place) for place in (Path(__file__).parents[1], *local_packages(config))],
            model_config={"allow": [], "paths": False},  # so that those of `mlflow.pyfunc.load_model(uri, model_config=...)` are heard
            signature=_signature(),
            input_example=EXAMPLE,
            pip_requirements=[*own, *requirements(config)],
            mlflow_model=Model(run_id=run_id, model_id=model_id),
        )
    return target


def _signature() -> ModelSignature:
    """Of the output. The input has none: MLflow would turn every form of it into a table, and rows that do not fit into nothing."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    rows = TensorSpec(np.dtype("float32"), (-1, -1), "vectors or scores")
    return ModelSignature(None, Schema([rows]), ParamSchema([ParamSpec("output", "string", "vectors")]))
