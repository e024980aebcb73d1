"""What others call the same weights: official MILAN, MAE, mmpretrain, OpenAI and timm, read and written."""
