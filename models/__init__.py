"""Models: configuration, the decoder, checkpoints and tokenizers."""
