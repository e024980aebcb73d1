"""The paper: model, masking, encoder, decoders, position embedding, target bank, pretraining samples."""
