"""Experiment tracking and the model registry, the only door to MLflow, whose settings come before its first import."""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # also keeps the schema migrations of a fresh SQLite file off the screen
