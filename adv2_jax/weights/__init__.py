"""Weights: `files` reads and writes them, `zoo` knows what the tensors mean."""
