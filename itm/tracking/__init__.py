"""Experiment tracking and the model registry, the only door to MLflow, whose settings come before its first import."""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # also keeps the schema migrations of a fresh SQLite file off the screen
# Artifacts go through the server, which alone needs the store's address and keys. MLflow's own choice, where the server could do it, is
# addresses signed for its store as the server knows it (`http://objects:9000`): minutes of silent retries where a client can't reach it.
os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
