"""The fine-tuned classifier as an MLflow model, run by `mlflow models serve` and `mlflow models predict`.

MLflow copies this file and the package into the model, and runs this file when it saves and when it loads the model
("models from code"). Unlike the stages, this file imports mlflow.
"""

from pathlib import Path

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from milan.core.errors import UserError


class ServedClassifier(PythonModel):
    """Answer a table whose column `image` holds encoded images (base64 in JSON) with classes and probabilities.

    Each row gets its top_k classes (a parameter, 5 by default and for null), best first. A single bad image refuses the
    request: status 400, naming its row."""

    def load_context(self, context) -> None:
        from milan.serve.classify import ImageClassifier  # here: saving the model does not need torch

        self.classify = ImageClassifier(Path(context.artifacts["classifier"]))

    def predict(self, context, model_input: pd.DataFrame, params: dict | None = None) -> list[dict]:
        top_k = (params or {}).get("top_k")
        try:
            return self.classify(list(model_input["image"]), 5 if top_k is None else top_k)
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None


set_model(ServedClassifier())
