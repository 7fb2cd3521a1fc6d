"""delta_logits with a stack of adapters of their own ranks and columns."""

import pytest
import torch
from test_delta_logits import DTYPES, every_backend, those_that_check, truth

from chassis_kernels import delta_logits, delta_logits_, stack_adapters, use_backend


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def stack(adapters=3, v=50, dtype=torch.float32, seed=0):
    """Adapters of ranks 1, 3, 5, … with 4, 7, 10, … columns each, as lists and as `stack_adapters` makes of them."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    sizes = [(1 + 2 * a, 4 + 3 * a) for a in range(adapters)]
    lists = {
        "U": [draw(40, r) * 40**-0.5 for r, _ in sizes],
        "V": [draw(r, k) for r, k in sizes],
        "bias": [draw(k) for _, k in sizes],
        "mean": [draw(40) for _ in sizes],
        "cols": [torch.randint(v, (k,), generator=generator) for _, k in sizes],
    }
    lists["cols"][0] = None
    return lists, stack_adapters(**lists)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 9, 200])
def test_adapters_with_their_own_ranks_and_columns_equal_a_call_each(backend, n, dtype):
    lists, stacked = stack(dtype=dtype)
    logits, hidden, ids = torch.randn(n, 50).to(dtype), torch.randn(n, 40).to(dtype), torch.arange(n) % 4 - 1
    with use_backend(backend):
        together = delta_logits(logits, hidden, **stacked, adapter_id=ids)
    want = logits.clone()
    for a in range(3):
        u, v, c, m, own = (lists[name][a] for name in ("U", "V", "bias", "mean", "cols"))
        options = {"mean": m, "cols": torch.arange(4) if own is None else own}
        want[ids == a] = truth((logits[ids == a], hidden[ids == a], u, v, c), options).to(dtype)
    assert torch.equal(together[ids == -1], logits[ids == -1])
    assert torch.allclose(together, want, rtol=torch.finfo(dtype).eps, atol=2e-5)


@every_backend
def test_columns_of_minus_one_are_nowhere(backend):
    for n in (3, 150):
        logits, hidden = torch.zeros(n, 6), torch.ones(n, 1)
        cols = torch.tensor([[-1, 2, -1, 2], [5, 0, 1, -1], [-1, -1, -1, -1]])
        U, V, ids = torch.ones(3, 1, 1), torch.tensor([1.0, 2, 4, 8]).expand(3, 1, 4), torch.arange(n) % 3
        with use_backend(backend):
            delta_logits_(logits, hidden, U, V, cols=cols, adapter_id=ids)
        want = torch.tensor([[0, 0, 10.0, 0, 0, 0], [2, 4, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]])
        assert torch.equal(logits, want[ids])


@those_that_check
@pytest.mark.parametrize("bad", [-2, 50])
def test_a_column_out_of_range_is_found_in_adapters_that_are_used(backend, bad):
    _, stacked = stack()
    stacked["cols"][1, 2] = bad
    logits, hidden = torch.randn(4, 50), torch.randn(4, 40)
    before = logits.clone()
    with use_backend(backend):
        delta_logits(logits, hidden, **stacked, adapter_id=torch.tensor([0, 2, -1, 0]))
        with pytest.raises(IndexError, match=f"cols holds {bad}: expected ids from -1 to 49"):
            delta_logits_(logits, hidden, **stacked, adapter_id=torch.tensor([0, 2, 1, 0]))
    assert torch.equal(logits, before)


def test_gradcheck_with_own_columns():
    _, stacked = stack(dtype=torch.float64)
    cols, ids = stacked.pop("cols"), torch.tensor([2, 0, -1, 1])
    stacked["mean"] = stacked["mean"][:, :5].clone()
    stacked["U"] = stacked["U"][:, :5].clone()
    leaves = [torch.randn(4, 50).double(), torch.randn(4, 5).double(), *stacked.values()]
    leaves = [t.requires_grad_() for t in leaves]
    names = list(stacked)

    def run(logits, hidden, *rest):
        return delta_logits(logits, hidden, **dict(zip(names, rest, strict=True)), cols=cols, adapter_id=ids)

    assert torch.autograd.gradcheck(run, leaves)


@every_backend
def test_opcheck_with_own_columns(backend):
    _, stacked = stack()
    inputs = torch.randn(4, 50), torch.randn(4, 40), *stacked.values(), torch.tensor([2, 0, -1, 1])
    with use_backend(backend):
        torch.library.opcheck(torch.ops.chassis.delta_logits_.default, inputs)
        leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
        torch.library.opcheck(torch.ops.chassis.delta_logits.default, tuple(leaves))


def test_columns_that_all_share_stay_one_list():
    lists, _ = stack()
    lists["cols"] = [torch.arange(4, 8)] * 3
    lists |= {"V": [v[:, :4] for v in lists["V"]], "bias": [c[:4] for c in lists["bias"]]}
    assert torch.equal(stack_adapters(**lists)["cols"], torch.arange(4, 8))


def test_lists_of_different_lengths_are_refused():
    lists, _ = stack()
    lists["bias"].pop()
    with pytest.raises(ValueError, match="lists of \\[2, 3\\] tensors: expected one of each"):
        stack_adapters(**lists)
    with pytest.raises(ValueError, match="and an adapter"):
        stack_adapters([], [])
