"""Functions on tensors: fast weights, window attention and their blend, each with a readable definition."""
