"""bridge_project: every backend against the definition in float64; what it does with -inf, tails and blocked tokens."""

import functools

import pytest
import torch
from bridge_project_problems import check, double, loops, problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import LAYOUTS, far_apart, rerun_on

from chassis_kernels import BlockedTokens, BridgeTable, backends, bridge_project
from chassis_kernels.reference import bridge_project as reference

HAVE = [b for b in ("reference", "cpu") if not backends.why_not("bridge_project", b, "cpu")]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BUDGET = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(params=HAVE)
def backend(request):
    with backends.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("listed", [0, 6])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"blocked": True}, {"blocked": True, "normalize": True, "floor": True, "index": True}, {"several": True}],
    ids=str,
)
def test_definition_term_by_term(dense, listed, options):
    p = problem(v_e=13, v_b=11, listed=listed, dense=dense, temperature=1.5 if dense else 1.0, seed=3, **options)
    found = double(p)
    for mine, right in zip((found.log_q.exp(), found.mass, found.uncertainty), loops(p), strict=True):
        torch.testing.assert_close(mine, right.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", HAVE)
@given(
    n=st.integers(0, 40),
    v_e=st.integers(1, 150),
    v_b=st.integers(1, 150),
    entries=st.integers(0, 4),
    listed=st.integers(0, 9),
    dense=st.booleans(),
    blocked=st.booleans(),
    normalize=st.booleans(),
    floor=st.booleans(),
    index=st.booleans(),
    several=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(sorted(LAYOUTS)),
    temperature=st.sampled_from([1.0, 2.0, 0.5]),
    seed=st.integers(0, 99),
)
@BUDGET
def test_values(
    name, n, v_e, v_b, entries, listed, dense, blocked, normalize, floor, index, several, dtype, layout, temperature, seed
):
    options = {"temperature": temperature, "normalize": normalize, "floor": floor, "index": index, "several": several}
    p = problem(n, v_e, v_b, entries, listed, dense, blocked, seed, **options).to(dtype)
    if dense:
        p = p._replace(logits=LAYOUTS[layout](p.logits))
    with backends.use_backend(name):
        check(p)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 5000, 3000), (19, 3001, 1999), (33, 700, 4097)])
def test_wide_vocabularies(shape, dtype, backend):
    for options in ({}, {"blocked": True, "listed": 7}):
        check(problem(*shape, seed=1, **options).to(dtype))


def test_identity_table_gives_the_expert_back(backend):
    """M = 1: q is softmax(z) to the rounding of the two exponentials and the logarithm. Logits beyond the table are cut."""
    logits = 3 * torch.randn(20, 333, generator=torch.Generator().manual_seed(0))
    table = BridgeTable(torch.arange(334), torch.arange(333), torch.ones(333), 333)
    found = bridge_project(torch.cat([logits, torch.full((20, 9), 70.0)], 1), table)
    torch.testing.assert_close(found.log_q, torch.log_softmax(logits, 1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.mass, torch.ones(20), rtol=0, atol=5e-7)
    assert not found.uncertainty.any()


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_offsets(offset, backend):
    check(problem(seed=2)._replace(logits=problem(seed=2).logits + offset))


def test_minus_infinity(backend):
    p = problem(20, blocked=True, seed=4)
    p.logits[:, ::3] = -torch.inf
    p.logits[:, 1] = torch.finfo(torch.float32).min
    check(p)
    p.logits[2:9] = -torch.inf
    found = check(p)
    assert (found.log_q[2:9] == -torch.inf).all() and not found.mass[2:9].any() and (found.uncertainty[2:9] == 1).all()


def test_nan_is_not_hidden(backend):
    p = problem()
    p.logits[1, 3], p.logits[3] = torch.nan, torch.nan
    found = bridge_project(p.logits, p.table)
    for part in found:
        assert part[[1, 3]].isnan().any() and not part[[0, 2, 4]].isnan().any()
    assert found.mass[[1, 3]].isnan().all()


def test_underflow_leaves_no_mass_and_no_nan(backend):
    p = problem(v_b=200)
    p.logits[:, 7] += 500
    found = check(p)
    assert (found.log_q == -torch.inf).any()


def test_a_sure_expert(backend):
    """P near 1 for one token: log q of its base token is a small number and must not be rounding noise of the sum."""
    table = BridgeTable(torch.arange(51), torch.arange(50), torch.ones(50), 50)
    logits = torch.zeros(3, 50)
    logits[:, 4] = 14.0
    found, right = bridge_project(logits, table).log_q, torch.log_softmax(logits.double(), 1)
    assert (found[:, 4] - right[:, 4]).abs().max() <= 2 * torch.finfo(torch.float32).eps


def test_unmapped_mass_is_reported_and_only_scaled_away_on_request(backend):
    table = BridgeTable(torch.tensor([0, 1, 1, 2]), torch.tensor([1, 0]), torch.tensor([1.0, 0.5]), 2)
    logits = torch.tensor([[0.2, 0.3, 0.5]]).log()
    found = bridge_project(logits, table)
    torch.testing.assert_close(found.log_q.exp(), torch.tensor([[0.25, 0.2]]))
    torch.testing.assert_close(found.mass, torch.tensor([0.45]))
    torch.testing.assert_close(found.uncertainty, torch.tensor([0.3 + 0.25]))
    scaled = bridge_project(logits, table, normalize=True)
    torch.testing.assert_close(scaled.log_q.exp(), torch.tensor([[0.25, 0.2]]) / 0.45)
    assert torch.equal(scaled.mass, found.mass)


def test_tail_of_a_top_k_is_neither_mapped_nor_spread(backend):
    p = problem(entries=1)
    log_p = torch.log_softmax(p.logits[:, :50], 1)
    top, ids = log_p.topk(9)
    full, cut = bridge_project(p.logits, p.table), bridge_project(None, p.table, log_probs=top, ids=ids)
    tail = 1 - top.exp().sum(1)
    assert (cut.log_q <= full.log_q + 1e-6).all() and (cut.mass <= 1 - tail + 1e-6).all()
    torch.testing.assert_close(cut.uncertainty, (top.exp() * p.table.spread[ids]).sum(1) + tail)
    every = bridge_project(None, p.table, log_probs=log_p, ids=torch.arange(50).expand(5, -1))
    torch.testing.assert_close(every.mass, full.mass)
    torch.testing.assert_close(every.log_q, full.log_q, rtol=1e-5, atol=1e-5)


def test_listed_and_dense_parts_add_up(backend):
    p = problem(listed=5)
    both = bridge_project(p.logits, p.table, **p.options)
    dense = bridge_project(p.logits, p.table)
    listed = bridge_project(None, p.table, log_probs=p.options["log_probs"], ids=p.options["ids"])
    share = p.options["log_weight"].exp()
    torch.testing.assert_close(
        both.log_q.exp(), share[:, None] * dense.log_q.exp() + listed.log_q.exp(), rtol=1e-5, atol=1e-8
    )
    nothing = torch.full((5,), -torch.inf)
    alone = bridge_project(p.logits, p.table, **p.options | {"log_weight": nothing})
    torch.testing.assert_close(alone, listed)


def test_positions_inside_a_token_condition_on_its_first_bytes(backend):
    """Tokens a ab abc b c; after the byte a: the residuals b and bc of ab and abc, renormalised over them."""
    rows, ids = torch.tensor([0, 1, 2, 3, 4, 5, 5]), torch.tensor([0, 0, 0, 1, 2, 1, 2])  # row 5: residual bc
    table = BridgeTable.from_entries(rows, ids, torch.tensor([1.0, 1, 1, 1, 1, 0.75, 0.25]), (6, 3), n_expert=5)
    p = torch.tensor([[0.4, 0.1, 0.3, 0.1, 0.1]])
    members, residuals = torch.tensor([1, 2]), torch.tensor([[3, 5]])
    found = bridge_project(None, table, log_probs=torch.log_softmax(p.log()[:, members], 1), ids=residuals)
    torch.testing.assert_close(found.log_q.exp(), torch.tensor([[0.0, 0.25 + 0.75 * 0.75, 0.75 * 0.25]]))
    torch.testing.assert_close(found.mass, torch.ones(1))


def test_blocked_tokens_get_nothing_and_the_rest_their_share(backend):
    p = problem(40, blocked=True)
    free, found = bridge_project(p.logits, p.table), check(p)
    lists, previous = p.options["blocked"], p.options["previous"]
    for i, which in enumerate(previous.tolist()):
        if which < 0:
            assert torch.equal(found.log_q[i], free.log_q[i])
            continue
        banned = lists.tokens[lists.start[which] : lists.start[which + 1]].long()
        kept = torch.ones(40, dtype=torch.bool).index_fill(0, banned, False)
        assert (found.log_q[i, banned] == -torch.inf).all()
        shift = (found.log_q[i] - free.log_q[i])[kept & (free.log_q[i] > -torch.inf)]
        assert not len(shift) or shift.max() - shift.min() <= 1e-5
    assert not found.mass[previous == 3].any() and (previous == 3).any()


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("n", [2, 37])
def test_a_floor_is_mixed_in_last(n, blocked, backend):
    p = problem(n, blocked=blocked, floor=True)
    found = check(p)
    floor = p.options.pop("floor")
    plain = bridge_project(p.logits, p.table, **p.options)
    torch.testing.assert_close(found.log_q.exp(), (1 - floor.sum()) * plain.log_q.exp() + floor)
    assert torch.equal(found.mass, plain.mass) and torch.equal(found.uncertainty, plain.uncertainty)
    nothing = bridge_project(p.logits, p.table, **p.options, floor=torch.zeros(40))
    assert torch.equal(nothing.log_q, plain.log_q)


@pytest.mark.parametrize("n", [1, 30])
def test_rows_are_read_where_the_index_says(n, backend):
    p = problem(9, blocked=True, listed=3)
    rows = torch.randint(0, 9, (n,), generator=torch.Generator().manual_seed(n))
    options = {name: value if name == "blocked" else value[rows] for name, value in p.options.items()}
    found = bridge_project(p.logits, p.table, **options, index=rows)
    for mine, right in zip(found, bridge_project(p.logits[rows], p.table, **options), strict=True):
        assert torch.equal(mine, right)


def test_lists_of_unequal_length_are_those_padded_with_nothing(backend):
    p, q = problem(23, listed=6, blocked=True), problem(23, listed=6, blocked=True)
    kept = q.options["ids"] >= 0
    q.options["listed_start"] = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    q.options.update({name: q.options[name][kept] for name in ("log_probs", "ids")})
    for a, b in zip(bridge_project(*p[:2], **p.options), bridge_project(*q[:2], **q.options), strict=True):
        assert torch.equal(a, b) if backend == "cpu" else torch.allclose(a, b)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("n", [2, 30])
def test_several_states_of_a_row_are_mixed(n, temperature, backend):
    """Alone, shared, in either order, without weight, all -inf, and none at all."""
    p = problem(4)
    p.logits[3] = -torch.inf
    mixtures = [[(0, 1.0)], [(0, 0.3), (1, 0.7)], [(1, 0.7), (0, 0.3)], [(2, 1e-33), (1, 1.0)], [(3, 0.9), (2, 0.1)], []]
    mixtures = [mixtures[i % len(mixtures)] for i in range(1, n + 1)]
    start = torch.tensor([0, *(len(own) for own in mixtures)]).cumsum(0)
    index, weight = (torch.tensor([state[i] for own in mixtures for state in own]) for i in (0, 1))
    options = {"temperature": temperature, "index": index, "index_start": start, "log_weight": weight.log()}
    found = check(p._replace(options=options))
    each = bridge_project(p.logits, p.table, temperature=temperature)
    for row, own in enumerate(mixtures):
        q = sum((w * each.log_q[i].exp() for i, w in own), torch.zeros(40))
        torch.testing.assert_close(found.log_q[row].exp(), q, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(found.mass[row], sum((w * each.mass[i] for i, w in own), torch.tensor(0.0)))


def test_a_nan_in_a_further_state_is_not_hidden(backend):
    p = problem()
    p.logits[3, 2] = torch.nan
    states = {"index": torch.tensor([0, 3, 1]), "index_start": torch.tensor([0, 2, 3])}
    found = bridge_project(p.logits, p.table, **states, log_weight=torch.tensor([-0.1, -3, 0]))
    assert found.mass.isnan().tolist() == [True, False] and found.log_q[0].isnan().any() and not found.log_q[1].isnan().any()


def test_what_stands_beside_logits_in_float64_changes_neither_backend_nor_dtype():
    p = problem(9, listed=4, floor=True)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in p.options.items()}
    calls = backends.OPS["bridge_project"].calls
    before = calls["cpu"], calls["reference"]
    for a, b in zip(bridge_project(p.logits, p.table, **wide), bridge_project(p.logits, p.table, **p.options), strict=True):
        assert torch.equal(a, b) and a.dtype == torch.float32
    same = (before[0] + 2, before[1]) if "cpu" in HAVE else (before[0], before[1] + 2)
    assert (calls["cpu"], calls["reference"]) == same


@pytest.mark.parametrize("empty", [{"n": 0}, {"entries": 0}, {"v_b": 1}, {"v_e": 1}, {"dense": False, "listed": 0}], ids=str)
def test_empty_inputs(empty, backend):
    for blocked in (False, True):
        check(problem(blocked=blocked, floor=True, index=True, **empty))
        found = check(problem(blocked=blocked, **empty))
        if "entries" in empty or "dense" in empty:
            assert (found.log_q == -torch.inf).all() and not found.mass.any()
            torch.testing.assert_close(found.uncertainty, torch.ones(5))


def test_empty_table(backend):
    found = bridge_project(torch.empty(3, 0), BridgeTable(torch.tensor([0]), torch.tensor([]).long(), torch.tensor([]), 0))
    assert found.log_q.shape == (3, 0) and not found.mass.any() and (found.uncertainty == 1).all()


def test_threads_do_not_change_a_bit(backend):
    p = problem(70, 900, 800, listed=3, blocked=True)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(bridge_project(p.logits, p.table, **p.options))
    torch.set_num_threads(before)
    if backend == "cpu":
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.skipif("cpu" not in HAVE, reason="no C++ implementation")
def test_rows_far_apart_are_reached():
    """Offsets past 2^31."""
    p = problem(20, 40, 30)
    for few in (3, 20):
        apart = bridge_project(far_apart(p.logits[:few]), p.table)
        for a, b in zip(apart, bridge_project(p.logits[:few], p.table), strict=True):
            assert torch.equal(a, b)


def test_opcheck(backend):
    torch.library.opcheck(torch.ops.chassis.bridge_project.default, backends.OPS["bridge_project"].example("cpu"))


def test_autocast(backend):
    p = problem(listed=3)
    plain = bridge_project(p.logits, p.table, **p.options)
    with torch.autocast("cpu", torch.bfloat16):
        cast = bridge_project(p.logits, p.table, **p.options)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_compiled_without_graph_breaks(backend):
    torch._dynamo.reset()
    p = problem()
    p.table.columns, p.table.row_sum, p.table.spread  # noqa: B018 - built once per table, outside the graph
    step = functools.partial(bridge_project, table=p.table, temperature=1.5)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 3):
        for a, b in zip(step(p.logits[:rows]), compiled(p.logits[:rows]), strict=True):
            assert torch.equal(a, b)


def test_the_reference_has_gradients_and_the_op_says_so(backend):
    p = problem(3, 9, 8, extra=0)
    with pytest.raises(RuntimeError, match="no gradient: detach"):
        bridge_project(p.logits.clone().requires_grad_(), p.table).log_q.sum().backward()
    p = p.to(torch.float64)
    table = p.table
    view = (*table.columns[:2], table.weights.double()[torch.argsort(table.ids, stable=True)])

    def mapped(z):
        log_q, mass, uncertainty = reference.bridge_project(
            z, *(None,) * 6, *view, table.row_sum.double(), table.spread.double(), *(None,) * 4, 9, 1.5, False
        )
        return log_q.exp(), mass, uncertainty

    assert torch.autograd.gradcheck(mapped, p.logits.requires_grad_())


@pytest.mark.skipif("cpu" not in HAVE, reason="no C++ implementation")
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set(isa):
    rerun_on(isa, __file__, "cpu and (values or wide or infinity or empty or sure or blocked or several)")


LISTED = {"log_probs": torch.zeros(3), "ids": torch.arange(3)}


def test_what_does_not_fit_is_refused():
    p = problem(listed=2, blocked=True)
    logits, table, given = p.logits, p.table, p.options
    other = BlockedTokens(torch.tensor([0]), torch.tensor([]).long(), 39)
    for z, options, message in (
        (None, {}, "neither logits"),
        (logits[0], {}, r"expected \[N, >= 50\]"),
        (logits[:, :49], {}, r"expected \[N, >= 50\]"),
        (logits.long(), {}, "logits are torch.int64"),
        (logits, {"ids": given["ids"]}, "one is missing"),
        (logits, {"log_probs": given["log_probs"], "ids": given["ids"]}, "need log_weight"),
        (None, {"log_probs": given["log_probs"], "ids": given["ids"].int()}, "ids torch.int32"),
        (None, {"log_probs": given["log_probs"], "ids": given["ids"] + 54}, r"ids hold 5\d to \d+: expected -1..53"),
        (logits, {"log_weight": torch.zeros(4)}, r"log_weight is \(4,\)"),
        (logits, {"temperature": 0.0}, "temperature is 0"),
        (logits, {"previous": given["previous"]}, "one is missing"),
        (logits, {"blocked": given["blocked"], "previous": torch.full((5,), 4)}, "previous hold 4 to 4: expected -1..3"),
        (logits, {"blocked": given["blocked"], "previous": given["previous"].float()}, "previous is torch.float32"),
        (logits, {"index": torch.tensor([0, 5])}, "index hold 0 to 5: expected 0..4"),
        (logits, {"index": torch.zeros(5)}, "index is torch.float32"),
        (None, {"log_probs": given["log_probs"], "ids": given["ids"], "index": torch.arange(5)}, "rows of logits"),
        (logits, {"index_start": torch.arange(6)}, "index_start is .* beside index"),
        (logits, {"index": torch.arange(5), "index_start": torch.arange(6) / 2}, "index_start is torch.float32"),
        (logits, {"index": torch.arange(5), "index_start": torch.arange(5)}, "index_start goes from 0 to 4: .* from 0 to 5"),
        (logits, {"index": torch.arange(5), "index_start": torch.tensor([0, 4, 3, 5])}, "ascend from 0 to 5"),
        (logits, {"index": torch.arange(5), "index_start": torch.tensor([0, 5]), "previous": torch.arange(5)}, "missing"),
        (None, {"listed_start": torch.arange(6)}, "neither logits"),
        (logits, {"listed_start": torch.arange(6)}, "listed_start is .* beside ids"),
        (None, {"log_probs": given["log_probs"], "ids": given["ids"], "listed_start": torch.arange(6)}, r"both \[L\]"),
        (logits, LISTED | {"listed_start": torch.arange(4)}, r"both \[L\], and listed_start \[6\]"),
        (None, LISTED | {"listed_start": torch.tensor([0, 2])}, "listed_start goes from 0 to 2: .* from 0 to 3"),
        (logits, {"floor": torch.zeros(39)}, r"floor is torch.float32 \(39,\): expected floats \[40\]"),
        (logits, {"floor": torch.full((40,), torch.nan)}, "a NaN"),
        (logits, {"floor": torch.ones(40)}, "more than 1 in all"),
        (logits, {"blocked": other, "previous": given["previous"]}, "blocked is for 39 base tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            bridge_project(z, table, **options)
