"""The built-in captioned image world: drawing.py draws a scene, writing.py writes scenes in the layouts of the real data sets."""
