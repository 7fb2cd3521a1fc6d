"""Eager PyTorch, readable and float64-capable: the definition of right for every op."""
