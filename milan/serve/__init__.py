"""The fine-tuned classifier behind HTTP."""
