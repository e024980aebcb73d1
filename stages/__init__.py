"""The stages of the pipeline, one script each."""

import milan  # noqa: F401  # first of all, for its UTF-8 mode
