"""A classifier as an MLflow model: MLflow copies this file into the model and runs it where the model is loaded, so it
knows nothing of this project. It needs what the model names as its requirements alone."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import mlflow
import mlflow.pyfunc
import numpy as np
import pandas as pd
import torch
from PIL import Image

BATCH = 256  # images


class ImageClassifier(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """uint8 images (N x H x W x 3, RGB) in; out a row for each: `label`, a class name, and `probabilities`, one for
    every class in the order of `class_names` in submission.py."""

    def load_context(self, context: Any) -> None:
        """Import submission.py and load the weights."""
        spec = importlib.util.spec_from_file_location("submission", context.artifacts["submission"])
        if spec is None or spec.loader is None:
            raise ImportError(f"{context.artifacts['submission']}: no Python file")
        self.submission = importlib.util.module_from_spec(spec)
        before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the model's folder may be read-only
        try:
            spec.loader.exec_module(self.submission)
        finally:
            sys.dont_write_bytecode = before
        self.network = self.submission.get_model()
        weights = torch.load(context.artifacts["weights"], map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights)
        self.network.eval()

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return a row with `label` and `probabilities` for each image."""
        names, rows = self.submission.class_names, []
        for first in range(0, len(model_input), BATCH):
            images = [Image.fromarray(image) for image in model_input[first : first + BATCH].astype(np.uint8)]
            batch = torch.stack([self.submission.eval_transform(image) for image in images])
            with torch.no_grad():
                probabilities = self.network(batch).softmax(1)
            rows += [{"label": names[int(row.argmax())], "probabilities": row.tolist()} for row in probabilities]
        return pd.DataFrame(rows, columns=["label", "probabilities"])


mlflow.models.set_model(ImageClassifier())
