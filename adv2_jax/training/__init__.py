"""Training: one loop, `fit`, and what each task brings to it."""
