"""mean_probabilities: the mean softmax in chunks of rows is that of all rows at once."""

import pytest
import torch

from chassis_kernels import mean_probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mean_probabilities_in_chunks_of_rows(dtype):
    torch.manual_seed(0)
    h, W = (torch.randn(600, 8) * 2).to(dtype), torch.randn(50, 8).to(dtype)
    bias = torch.randn(50)
    found = mean_probabilities(h, W, bias, softcap=5.0, scale=0.7)
    want = (5 * torch.tanh(0.7 * (h.double() @ W.double().T + bias.double()) / 5)).softmax(1).mean(0)
    assert found.dtype == torch.float64
    assert torch.allclose(found, want, rtol=1e-5) and abs(float(found.sum()) - 1) < 1e-6
    for bad in (h[:0], h[0]):
        with pytest.raises(ValueError, match="at least one row"):
            mean_probabilities(bad, W)
