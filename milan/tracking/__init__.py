"""What is logged and where it came from: MLflow runs, their delivery, the hardware."""
