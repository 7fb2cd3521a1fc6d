"""Streaming moments, delta-logit and KL kernels with eager PyTorch references."""
