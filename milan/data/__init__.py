"""Samples: keyed random draws, images and their transforms, records, the evaluation view."""
