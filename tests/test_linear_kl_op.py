"""linear_kl as an op of torch: opcheck, torch.compile, autocast."""

import torch
from test_linear_kl import each_backend, problem
from torch._subclasses.fake_tensor import FakeTensorMode

from chassis_kernels import Delta, backends, linear_kl, use_backend


@each_backend
def test_opcheck(backend):
    for name in ("linear_kl", "linear_kl_with_gradients", "linear_kl_backward"):
        if backend not in backends.OPS[name].implementations:
            continue
        inputs = backends.OPS[name].example("cpu")
        with use_backend(backend):
            torch.library.opcheck(getattr(torch.ops.chassis, name).default, inputs)
    inputs = list(backends.OPS["linear_kl"].example("cpu"))
    inputs[6:9] = [t.requires_grad_() for t in inputs[6:9]]
    with use_backend(backend):
        torch.library.opcheck(torch.ops.chassis.linear_kl.default, tuple(inputs))


@each_backend
def test_compiles_in_one_graph_with_dynamic_shapes_and_scalars(backend):
    def step(h_a, W_a, h_b, W_b, delta, scale):
        kl, stats = linear_kl(h_a * 2, W_a, h_b, W_b, delta=delta, scale_a=scale, softcap_a=9.0, stats=True)
        return kl.sin(), stats.lse_a, stats.argmax_b

    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        with use_backend(backend):
            for n, scale in ((5, 1.0), (9, 0.5), (12, 0.25)):
                heads, delta = problem(n)
                leaves = Delta(*(t.requires_grad_() for t in delta))
                found, want = compiled(*heads, leaves, scale), step(*heads, leaves, scale)
                assert all(map(torch.equal, found, want))
                grads = [torch.autograd.grad(each[0].sum(), leaves) for each in (found, want)]
                assert all(map(torch.equal, *grads))
    finally:
        torch.use_deterministic_algorithms(False)


def test_fake_tensors_have_gradients_of_the_right_shape():
    heads, delta = problem()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in (*heads, *delta)]
        leaves = [t.requires_grad_() for t in fake[4:]]
        grads = torch.autograd.grad(linear_kl(*fake[:4], delta=Delta(*leaves)).mean(), leaves)
        assert [g.shape for g in grads] == [t.shape for t in delta]
        grads = torch.ops.chassis.linear_kl_with_gradients(*heads, None, None, *delta, None, None, 1.0, 1.0, [True] * 3)[5:]
        assert [g.shape for g in grads] == [t.shape for t in delta]


@each_backend
def test_autocast_changes_nothing(backend):
    heads, delta = problem()
    leaves = Delta(*(t.requires_grad_() for t in delta))
    with use_backend(backend):
        plain = linear_kl(*heads, delta=leaves)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            other = linear_kl(*heads, delta=leaves)
            found = torch.autograd.grad(other.sum(), leaves)
        assert torch.equal(plain, other)
        assert all(map(torch.equal, found, torch.autograd.grad(plain.sum(), leaves)))
