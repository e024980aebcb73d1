"""MILAN: masked image pretraining on language assisted representation (arXiv 2208.06049)."""
