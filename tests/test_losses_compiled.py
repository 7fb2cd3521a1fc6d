"""The losses in memory that holds NaN where nothing was written, and under torch.compile."""

import pytest
import torch
from loss_problems import make, run
from support import backends_of, each_op

from chassis_kernels import use_backend

LOSSES = ("projection_kl", "gold_kl", "token_kl", "linear_projection_kl")


@pytest.fixture
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def nan_in_new_memory():
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(False)


@each_op(*LOSSES, "linear_kl")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_that_was_not_written_is_not_read(name, dtype, backend, nan_in_new_memory):
    """float32: the gradient is made with the loss; float16: apart."""
    case = make(name).to(dtype)
    loss, grads = run(case.op, case)
    torch.use_deterministic_algorithms(False)
    right_loss, right = run(case.op, case)
    assert torch.equal(loss, right_loss) and all(map(torch.equal, grads, right))


@pytest.mark.parametrize("name", [name for name in LOSSES if "cpu" in backends_of(name)])
def test_one_graph_serves_other_shapes_and_a_changed_scalar_is_seen(name, nan_in_new_memory):
    torch._dynamo.reset()
    op = make(name).op
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True, dynamic=True)

    def agree(b, t, temperature):
        case = make(name, b, t)  # what it holds is new to the compiler: no eager call has touched it
        loss, grads = run(compiled, case, temperature=temperature)
        right_loss, right = run(op, case, temperature=temperature)
        torch.testing.assert_close(loss, right_loss, rtol=1e-6, atol=0)
        for found, want in zip(grads, right, strict=True):
            torch.testing.assert_close(found, want)

    with use_backend("cpu"):
        agree(3, 9, 1.5)
        with torch.compiler.set_stance("fail_on_recompile"):
            agree(7, 12, 1.5)
        if name in ("gold_kl", "token_kl"):  # projection_kl's temperature takes the same way
            agree(7, 12, 0.5)
