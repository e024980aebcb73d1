"""How good an encoder is: linear evaluation, nearest neighbours, fine-tuning, zero-shot."""
