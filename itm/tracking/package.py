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
            model_config={"allow": []},  # so that `mlflow.pyfunc.load_model(uri, model_config={"allow": [...]})` is heard
            signature=_signature(),
            pip_requirements=[*own, *requirements(config)],
            mlflow_model=Model(run_id=run_id, model_id=model_id),
        )
    return target


def _signature() -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType

    columns = [ColSpec(AnyType(), "image", required=False), ColSpec("string", "text", required=False)]
    return ModelSignature(Schema([*columns]), None, ParamSchema([ParamSpec("output", "string", "vectors")]))
