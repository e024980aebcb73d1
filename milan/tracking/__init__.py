"""Log runs, their data and their models to MLflow, and find the run that made a result."""
