"""PyTorch originals: one file per family, found by listing this directory."""
