"""The distillation losses on logits spread over ranks: the student's vocabulary in slabs, the sequence in parts.

Each file has the equations of its namesake in `reference/`, with the sums over tokens and positions that cross a border
added up over a process group. The local work is PyTorch in tiles of rows: besides the gradient nothing of [T, V] is made.
"""
