"""Other projects' names for the same weights: official, MAE, mmpretrain, OpenAI, timm; in and out."""
