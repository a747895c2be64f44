"""Model families: one file each, from a checkpoint's config to a ModelConfig and a weight-name map."""
