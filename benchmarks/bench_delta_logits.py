"""The cases of `benchmarks/ops/delta_logits.py` under pytest-benchmark, and several adapters against one."""

import pytest
import torch

from benchmarks.pytest_entry import entry
from chassis_kernels import delta_logits_

test_delta_logits = entry("delta_logits")
D, R, K, VOCABULARY = 2048, 128, 2048, 32000


@pytest.mark.parametrize("adapters", [1, 8])
def test_64_rows_with_several_adapters(benchmark, adapters):
    generator = torch.Generator().manual_seed(0)
    benchmark.group = f"delta_logits_, 64 rows, D={D}, r={R}, K={K}, V={VOCABULARY}, fp32"
    logits, hidden = torch.randn(64, VOCABULARY, generator=generator), torch.randn(64, D, generator=generator)
    U = torch.randn(adapters, D, R, generator=generator) * D**-0.5
    V = torch.randn(adapters, R, K, generator=generator) * R**-0.5
    columns = torch.randperm(VOCABULARY, generator=generator)[:K].sort().values
    benchmark(delta_logits_, logits, hidden, U, V, cols=columns, adapter_id=torch.arange(64) % adapters)
