"""The next-token loss on sharded logits.

nll = max z - z[label] + log Σ exp(z - max)     the label's part from the slab that has it
dz  = softmax(z) - [label]
"""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels.parallel.groups import Parallel
from chassis_kernels.parallel.rows import RowStats, row_stats, tiles
from chassis_kernels.reference.precision import compute_dtype


def next_token_nll(logits: Tensor, labels: Tensor, parallel: Parallel) -> tuple[Tensor, Tensor]:
    """-log softmax(z)[label] in nats, [B, T], 0 where the label is -1; and [B, T] bool: no token is likelier."""
    nll, right = _NLL.apply(logits.flatten(0, 1), labels.flatten(), parallel.slab(logits), parallel)
    return nll.view(labels.shape), right.view(labels.shape)


class _NLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, slab, parallel):
        rows = (labels >= 0).nonzero()[:, 0]
        stats = row_stats(logits, rows, 1.0, compute_dtype(logits), parallel)
        own = ((labels >= slab.start) & (labels < slab.stop)).nonzero()[:, 0]
        places = labels[own] - slab.start
        below = torch.zeros_like(stats.max)
        below[own] = stats.max[own] - logits[own, places].to(below.dtype)
        below = parallel.vocab_sum(below)
        right = (labels >= 0) & (below == 0)
        ctx.save_for_backward(logits, rows, own, places, *stats)
        ctx.mark_non_differentiable(right)
        return below + stats.sum.log(), right

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        logits, rows, own, places, *stats = ctx.saved_tensors
        out, stats = torch.zeros_like(logits), RowStats(*stats)
        label = torch.full((len(logits),), -1, device=rows.device).index_copy(0, own, places)
        for tile in tiles(rows, logits.shape[1]):
            p = stats.softmax(logits[tile].to(grad.dtype), tile, 1.0)
            here = (label[tile] >= 0).nonzero()[:, 0]
            p[here, label[tile][here]] -= 1
            out[tile] = (p * grad[tile, None]).to(out.dtype)
        return out, None, None, None
