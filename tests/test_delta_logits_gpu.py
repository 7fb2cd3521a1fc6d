"""delta_logits_ on a GPU: two kernels a call, and the same ones again from a captured graph."""

import pytest
import torch
from test_delta_logits import problem, truth

from chassis_kernels import backends, delta_logits_, use_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(bool(backends.why_not("delta_logits_", "triton", "cuda")), reason="no triton"),
]


def on_gpu(arguments, options):
    return tuple(t.cuda() for t in arguments), {name: t.cuda() for name, t in options.items()}


@pytest.mark.parametrize("adapters", [None, 3])
@pytest.mark.parametrize("n", [1, 64])
def test_a_captured_graph_replays_on_other_rows(n, adapters):
    arguments, options = on_gpu(*problem(n, adapters=adapters))
    with use_backend("triton"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles the kernels, which cannot be done while a graph is captured
            delta_logits_(*arguments, **options)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            delta_logits_(*arguments, **options)
    for seed in (1, 2):  # of the rows, and of which adapter each takes
        (logits, hidden, *_), other = problem(n, adapters=adapters, seed=seed)
        arguments[0].copy_(logits)
        arguments[1].copy_(hidden)
        if adapters:
            options["adapter_id"].copy_(other["adapter_id"])
        want = truth([t.cpu() for t in arguments], {name: t.cpu() for name, t in options.items()})
        graph.replay()
        torch.testing.assert_close(arguments[0].cpu().double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapters", [None, 3])
def test_a_call_runs_two_kernels(adapters):
    arguments, options = on_gpu(*problem(64, adapters=adapters))
    with use_backend("triton"):
        delta_logits_(*arguments, **options)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            delta_logits_(*arguments, **options)
            torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert kernels == ["down", "up"]
