"""Triton kernels: one file per op, imported at the op's first call, since they need triton and the package does not.

`shared.py` holds what they share, `tuning.py` reads their tile sizes from chassis_kernels/tuning/<op>.json.
"""
