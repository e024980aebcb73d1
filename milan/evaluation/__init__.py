"""Measure an encoder: linear evaluation, nearest neighbours, fine-tuning, zero-shot classification."""
