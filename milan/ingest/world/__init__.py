"""The built-in captioned image world: drawing.py draws scenes, writing.py writes them in the layouts of the real data sets."""
