"""delta_logits_ without torch's dispatcher: the same bits, hidden from nobody who watches, and no read out of bounds."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import backends_of
from test_delta_logits import DTYPES, LAYOUTS, cast, problem, truth
from torch.utils._python_dispatch import TorchDispatchMode

from chassis_kernels import backends, delta_logits_, use_backend

pytestmark = pytest.mark.skipif(backends._C is None, reason="the C++ extension is not built")
OP = torch.ops.chassis.delta_logits_


def schema_order(arguments, options):
    return (*arguments, options["mean"], options.get("cols"), options.get("adapter_id"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapters", [None, 3])
@pytest.mark.parametrize("cols", [True, False])
def test_both_ways_give_the_same_bits_and_are_counted(dtype, adapters, cols):
    arguments, options = problem(7, adapters=adapters, dtype=dtype, cols=cols)
    wanted = arguments[0].clone()
    OP(wanted, *schema_order(arguments, options)[1:])
    calls = backends.OPS["delta_logits_"].calls
    before, version = calls["cpu"], arguments[0]._version
    assert torch.equal(delta_logits_(*arguments, **options), wanted)
    assert calls["cpu"] == before + 1 and arguments[0]._version > version


@pytest.mark.parametrize("name", LAYOUTS)
def test_tensors_that_lie_otherwise_are_copied_first(name):
    arguments, options = problem(adapters=2)
    want = truth(arguments, options)
    moved = tuple(map(LAYOUTS[name], arguments))
    options |= {key: LAYOUTS[name](t) for key, t in options.items()}
    torch.testing.assert_close(delta_logits_(*moved, **options).double(), want, rtol=1e-5, atol=1e-5)


def test_the_sign_of_a_negative_view_is_not_lost():
    arguments, options = problem()
    want = truth(arguments, options)
    views = (torch._neg_view(-t) for t in arguments[1:])
    torch.testing.assert_close(delta_logits_(arguments[0], *views, **options).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(50,), (1, 50), (6, 50), (2, 3, 50), (2, 1, 3, 1, 50)])
def test_leading_dimensions_merge(shape):
    arguments, options = problem(torch.Size(shape[:-1]).numel())
    want = truth(arguments, options)
    logits, hidden = (t.view(*shape[:-1], -1) for t in arguments[:2])
    found = delta_logits_(logits, hidden, *arguments[2:], **options).view(-1, 50).double()
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op.name())
        return op(*args, **kwargs or {})


def test_whoever_watches_a_call_sees_the_op():
    arguments, options = problem()
    with Seen() as seen:
        delta_logits_(*arguments, **options)
    assert "chassis::delta_logits_" in seen.ops
    with torch.profiler.profile() as profile:
        delta_logits_(*arguments, **options)
    assert "chassis::delta_logits_" in {event.key for event in profile.key_averages()}
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda logits: delta_logits_(logits, *arguments[1:], **options))
    assert "chassis.delta_logits_" in graph(arguments[0]).code
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (*arguments, options["cols"])]
        assert delta_logits_(*fake[:5], cols=fake[5]).shape == (5, 50)


def test_logits_of_inference_mode_are_taken():
    arguments, options = problem()
    want = truth(arguments, options)
    with torch.inference_mode():
        found = delta_logits_(arguments[0].clone(), *arguments[1:], **options)
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


def test_what_a_transform_wraps_never_reaches_the_kernel():
    arguments, options = problem()
    batch = arguments[0].expand(2, -1, -1).clone()
    with pytest.raises(RuntimeError, match="Batching rule"):
        torch.vmap(lambda logits: delta_logits_(logits, *arguments[1:], **options))(batch)


def test_a_subclass_of_tensor_is_taken():
    class Own(torch.Tensor):
        pass

    arguments, options = problem()
    want = truth(arguments, options)
    mine = arguments[0].as_subclass(Own)
    assert delta_logits_(mine, *arguments[1:], **options) is mine
    torch.testing.assert_close(mine.as_subclass(torch.Tensor).double(), want, rtol=1e-5, atol=1e-5)


def replaced(arguments, place, tensor):
    return (*arguments[:place], tensor, *arguments[place + 1 :])


@pytest.mark.parametrize(
    ("place", "tensor"),
    [
        (0, torch.zeros(5, 8)),  # cols name columns past the last
        (1, torch.zeros(4, 40)),
        (2, torch.zeros(40, 7)),
        (3, torch.zeros(6, 10)),
        (3, torch.zeros(1, 6, 9)),
        (4, torch.zeros(8)),
        (5, torch.zeros(1, 40)),
        (6, torch.zeros(10, dtype=torch.int64)),
        (6, None),
        (7, torch.zeros(5, dtype=torch.int64)),
    ],
)
def test_the_op_itself_reads_nothing_that_does_not_fit(place, tensor):
    everything = schema_order(*problem())
    with pytest.raises((ValueError, IndexError)):
        OP(*replaced(everything, place, tensor))
    assert place == 0 or torch.equal(everything[0], problem()[0][0])


def test_a_tensor_changed_between_two_calls_is_looked_at_again():
    arguments, options = problem()
    delta_logits_(*arguments, **options)
    arguments[3].set_(torch.zeros(6, 9))
    kept = arguments[0].clone()
    assert (delta_logits_(*arguments[:4], **options) - kept).abs().max() == 0
    arguments[3].resize_(6, 8)
    with pytest.raises(ValueError, match=r"V has shape \(6, 8\), expected|bias has shape"):
        delta_logits_(*arguments, **options)


@pytest.mark.parametrize("backend", [b for b in backends_of("delta_logits_") if b != "cpu"])
def test_another_backend_that_is_asked_for_runs(backend):
    arguments, options = problem()
    calls = backends.OPS["delta_logits_"].calls
    before = dict(calls)
    with use_backend(backend):
        delta_logits_(*arguments, **options)
    assert calls[backend] == before.get(backend, 0) + 1 and calls["cpu"] == before.get("cpu", 0)


def test_float64_goes_to_the_reference():
    arguments, options = cast(*problem(), torch.Tensor.double)
    assert torch.equal(delta_logits_(*arguments, **options), truth(*problem()))


def test_python_threads_do_not_share_scratch_memory():
    problems = [problem(9, 300, 20, 60, 400, seed=seed) for seed in range(4)]
    wanted = [truth(*each) for each in problems]

    def call(which):
        (logits, *rest), options = problems[which % 4]
        return [delta_logits_(logits.clone(), *rest, **options) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for which, found in enumerate(pool.map(call, range(8))):
            for each in found:
                torch.testing.assert_close(each.double(), wanted[which % 4], rtol=1e-5, atol=1e-5)


def test_rows_that_need_more_scratch_memory_than_is_kept():
    arguments, options = problem(1500, 512, 128, 64, 100, adapters=12)  # 8 parts of 1500 sums of 128: more than 2^20
    want = truth(arguments, options)
    torch.testing.assert_close(delta_logits_(*arguments, **options).double(), want, rtol=1e-5, atol=1e-5)
