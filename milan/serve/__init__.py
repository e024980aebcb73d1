"""Serve the fine-tuned classifier over HTTP."""
