"""Which implementation runs, and what happens where the one asked for cannot."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from chassis_kernels import BackendError, backends, capabilities, use_backend

needs_extension = pytest.mark.skipif(backends._C is None, reason="the C++ extension is not built")


def run(name):
    op = backends.OPS[name]
    before = dict(op.calls)
    getattr(torch.ops.chassis, name)(*op.example("cpu"))
    return [backend for backend, calls in op.calls.items() if calls > before.get(backend, 0)]


@pytest.mark.parametrize("name", sorted(backends.OPS))
def test_an_override_runs_exactly_that_backend(name):
    for backend in ("reference", *(["cpu"] if backends._C else [])):
        if backend in backends.OPS[name].implementations:
            with use_backend(backend):
                assert run(name) == [backend]


@needs_extension
@pytest.mark.parametrize("name", ["delta_logits", "delta_logits_", "linear_kl", "linear_kl_backward"])
def test_cpu_tensors_run_the_kernel_by_default(name):
    assert run(name) == ["cpu"]


@pytest.mark.parametrize("name", ["delta_logits_", "moments_update_"])
def test_an_override_that_cannot_run_raises_instead_of_falling_back(name):
    with use_backend("cuda"), pytest.raises(BackendError, match=f"{name}: backend 'cuda' was asked for, but"):
        run(name)


CALL = """
from chassis_kernels import backends
op = backends.OPS["bridge_project"]
try:
    op(*op.example("cpu"))
    print(dict(op.calls))
except backends.BackendError as error:
    print(error)
"""


@pytest.mark.parametrize(("asked", "printed"), [("cuda", "'cuda' was asked for"), ("reference", "{'reference': 1}")])
def test_an_override_by_environment_holds_or_raises_too(asked, printed):
    environment = os.environ | {"CHASSIS_BACKEND": asked}
    done = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, env=environment, check=True)
    assert printed in done.stdout


def test_an_unknown_backend_is_named_with_the_known_ones():
    with pytest.raises(BackendError, match="'gpu': expected one of reference, cpu, triton, cuda"), use_backend("gpu"):
        pass


def test_overrides_nest_and_end():
    with use_backend("reference"):
        with pytest.raises(BackendError), use_backend("cuda"):
            run("linear_kl")
        assert run("linear_kl") == ["reference"]
    assert run("linear_kl") == ["cpu" if backends._C else "reference"]


def test_capabilities_report_every_op_and_leave_no_override_behind():
    rows = capabilities()
    assert {(row["op"], row["backend"]) for row in rows} == {
        (op.name, backend) for op in backends.OPS.values() for backend in op.implementations
    }
    for row in rows:
        assert row["executed"] == (row["note"] == ""), row
        assert row["executed"] or row["backend"] != ("cpu" if backends._C else "reference"), row
    assert run("linear_kl") == ["cpu" if backends._C else "reference"]


@pytest.mark.parametrize("name", sorted(set(backends.OPS) - {"tridiagonal_reduce_"}))
def test_a_tensor_that_stands_for_its_negative_is_taken_for_it(name):
    """The imaginary part of a conjugate is a view of the values with a sign that is not written out.

    torch itself refuses such a tensor where an op writes to it.
    """
    op = backends.OPS[name]
    written = [a.alias_info is not None for a in getattr(torch.ops.chassis, name).default._schema.arguments]
    plain, given = op.example("cpu"), op.example("cpu")
    given = [arg if kept else tree_map(negated, arg) for arg, kept in zip(given, written, strict=True)]
    assert any(isinstance(t, torch.Tensor) and t.is_neg() for t in tree_leaves(given))
    found, expected = tree_leaves((op(*given), given)), tree_leaves((op(*plain), plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)


def negated(value):
    """A floating tensor as a contiguous view of its negative with the sign to come; else the value."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return torch._neg_view(-value)
    return value


WITHOUT_EXTENSION = """
import sys
sys.modules["chassis_kernels._C"] = None  # importing it now fails, as if it had not been built
import torch
from chassis_kernels import BackendError, backends, capabilities, delta_logits_, linear_kl, use_backend
assert backends._C is None
logits, hidden, U, V = torch.zeros(3, 8), torch.ones(3, 4), torch.ones(4, 2), torch.ones(2, 8)
assert delta_logits_(logits, hidden, U, V).eq(8).all()
assert linear_kl(hidden, torch.randn(8, 4), hidden, torch.randn(8, 4)).ge(0).all()
assert backends.OPS["linear_kl"].calls == {"reference": 1}
rows = [row for row in capabilities() if row["backend"] == "cpu"]
assert rows and not any(row["built"] or row["executed"] for row in rows)
assert all("install a C++17 compiler" in row["note"] for row in rows)
try:
    with use_backend("cpu"):
        linear_kl(hidden, torch.randn(8, 4), hidden, torch.randn(8, 4))
except BackendError as error:
    assert "the C++ extension is not built" in str(error)
else:
    raise AssertionError("fell back")
"""


def test_without_the_extension_the_reference_runs_and_asking_for_the_kernel_raises():
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
