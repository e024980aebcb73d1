"""The paper's method: model, masking, encoder, decoders, position embedding, target bank, pretraining samples."""
