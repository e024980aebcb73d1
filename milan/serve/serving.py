"""The fine-tuned classifier as a model of MLflow's: what `mlflow models serve` and `mlflow models predict` run.

MLflow copies this file and the package into the model and runs this file when it saves and when it loads the model
("models from code"); it needs mlflow itself, as no stage does.
"""

from pathlib import Path

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from milan.core.errors import UserError


class Served(PythonModel):
    """A table with a column `image` of encoded files (base64 in JSON) -> classes and probabilities, best first, a row
    each; the parameter top_k says how many. One bad image refuses the request, status 400, naming its row."""

    def load_context(self, context) -> None:
        from milan.serve.classify import Classify  # torch: not while the model is only saved

        self.classify = Classify(Path(context.artifacts["classifier"]))

    def predict(self, context, model_input: pd.DataFrame, params: dict | None = None) -> list[dict]:
        try:
            return self.classify(list(model_input["image"]), (params or {}).get("top_k", 5))
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None


set_model(Served())
