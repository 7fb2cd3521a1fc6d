"""Problems for bridge_project, their definition in float64 and term by term, and how far from it a backend may be."""

import math
from typing import NamedTuple

import torch

from chassis_kernels import BlockedTokens, BridgeTable, backends, bridge_project

SMALLEST = 1.2e-38  # float32's smallest normal number: below it log q may be -inf


class Problem(NamedTuple):
    logits: torch.Tensor
    table: BridgeTable
    options: dict

    def to(self, dtype):
        floats = {
            name: self.options[name].to(dtype) for name in ("log_probs", "log_weight", "floor") if name in self.options
        }
        return Problem(None if self.logits is None else self.logits.to(dtype), self.table, self.options | floats)


def make_table(rows, v_b, entries=2, n_expert=None, seed=0, unmapped=0.2):
    """Shares of up to `entries` base tokens per row, some rows empty, some summing to less than 1."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, v_b, (rows, entries), generator=g)
    weights = torch.rand(rows, entries, generator=g) * (torch.rand(rows, entries, generator=g) > unmapped)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
    places = torch.arange(rows)[:, None].expand_as(ids)
    return BridgeTable.from_entries(places.flatten(), ids.flatten(), weights.flatten(), (rows, v_b), n_expert=n_expert)


def problem(
    n=5, v_e=50, v_b=40, entries=2, listed=0, dense=True, blocked=False, seed=0,
    *, extra=3, floor=False, index=False, several=False, **options,
):  # fmt: skip
    """`listed` log-probabilities a row over residual rows and tokens, at most a third of the whole each way. `several`: none
    to four states a row, and lists of as many lengths."""
    g = torch.Generator().manual_seed(seed)
    table = make_table(v_e + 4, v_b, entries, v_e, seed)
    logits = 3 * torch.randn(n, v_e + extra, generator=g) if dense else None
    if floor:
        options["floor"] = torch.rand(v_b, generator=g) / (3 * v_b) * (torch.rand(v_b, generator=g) > 0.2)
    if index and dense and n:
        options["index"] = torch.randint(0, n, (n,), generator=g)
    if listed or not dense:
        options["log_probs"] = torch.log_softmax(torch.randn(n, listed, generator=g), 1) - math.log(3)
        options["ids"] = torch.randint(-1, v_e + 4, (n, listed), generator=g)
        if dense:
            options["log_weight"] = -torch.rand(n, generator=g) - math.log(2)
    if several and dense and n:
        count = torch.randint(0, 5, (n,), generator=g)
        options["index_start"] = torch.cat([count.new_zeros(1), count.cumsum(0)])
        options["index"] = torch.randint(0, n, (int(count.sum()),), generator=g)
        options["log_weight"] = (3 * torch.randn(len(options["index"]), generator=g) - 5).clamp_max(-2)
    if several and "ids" in options:
        kept = torch.rand(n, listed, generator=g) < 0.6
        options["listed_start"] = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
        options |= {name: options[name][kept] for name in ("log_probs", "ids")}
    if blocked:
        forbidden = torch.rand(4, v_b, generator=g) < torch.tensor([0.0, 0.3, 0.9, 1.0])[:, None]
        start = torch.cat([torch.zeros(1, dtype=torch.int64), forbidden.sum(1).cumsum(0)])
        options["blocked"] = BlockedTokens(start, forbidden.nonzero()[:, 1], v_b)
        options["previous"] = torch.randint(-1, 4, (n,), generator=g)
    return Problem(logits, table, options)


def double(p):
    """The definition in float64: log q, mass, uncertainty."""
    q = p.to(torch.float64)
    table = BridgeTable(p.table.start, p.table.ids, p.table.weights.double(), p.table.n_base, p.table.n_expert)
    with backends.use_backend("reference"):
        return bridge_project(q.logits, table, **q.options)


def check(p):
    """At most twice eager's error and eight roundings of float32, relative to 1 + |value|; Σ q = mass."""
    found, right = bridge_project(p.logits, p.table, **p.options), double(p)
    with backends.use_backend("reference"):
        eager = bridge_project(p.logits, p.table, **p.options)
    assert all(t.dtype == torch.float32 for t in found) and not any(t.isnan().any() for t in found)
    big = right.log_q > math.log(10 * SMALLEST)
    assert (found.log_q[big].isfinite()).all() and (found.log_q[right.log_q == -torch.inf] == -torch.inf).all()
    for mine, theirs, true in zip(found, eager, right, strict=True):
        where = big if mine.dim() == 2 else torch.ones_like(true, dtype=torch.bool)
        mine, theirs, true = (t.double()[where] for t in (mine, theirs, true))
        unit = 1 + true.abs()
        if len(true):
            limit = 2 * ((theirs - true).abs() / unit).max() + 8 * torch.finfo(torch.float32).eps
            assert ((mine - true).abs() / unit).max() <= limit
    total = torch.where(right.mass > 0, 1.0, 0.0) if p.options.get("normalize") else found.mass.double()
    if "floor" in p.options:
        total = (1 - p.options["floor"].double().sum()) * total + p.options["floor"].double().sum()
    if p.table.n_base:
        torch.testing.assert_close(found.log_q.double().exp().sum(1), total.double(), rtol=0, atol=1e-6)
    return found


def loops(p):
    """q, mass and uncertainty of one problem, term by term."""
    matrix, v_e, options = p.table.dense().double(), p.table.n_expert, p.options
    n = len(options["ids"] if p.logits is None else p.logits)
    n = len(options.get("index_start", options.get("listed_start", range(n + 1)))) - 1
    states, listed = (options.get(name, range(n + 1)) for name in ("index_start", "listed_start"))
    q, mass, uncertainty = torch.zeros(n, p.table.n_base, dtype=torch.float64), [0.0] * n, [0.0] * n
    for i in range(n):
        prob = [0.0] * len(matrix)
        for s in range(states[i], states[i + 1]) if p.logits is not None else ():
            weight = math.exp(options["log_weight"][s]) if "log_weight" in options else 1.0
            row = int(options["index"][s]) if "index" in options else s
            z = [float(x) / options.get("temperature", 1.0) for x in p.logits[row, :v_e]]
            total = sum(math.exp(x - max(z)) for x in z)
            for t in range(v_e):
                prob[t] += weight * math.exp(z[t] - max(z)) / total
        for k in range(listed[i], listed[i + 1]) if "ids" in options else ():
            for t, log_p in zip(options["ids"][k].flatten(), options["log_probs"][k].flatten(), strict=True):
                if t >= 0:
                    prob[t] += math.exp(log_p)
        for t, p_t in enumerate(prob):
            q[i] += p_t * matrix[t]
            mass[i] += p_t * float(matrix[t].sum())
            uncertainty[i] += p_t * (1 - float(matrix[t].max()))
        uncertainty[i] += 1 - sum(prob)
        if "previous" in options and options["previous"][i] >= 0:
            lists = options["blocked"]
            mine = slice(int(lists.start[options["previous"][i]]), int(lists.start[options["previous"][i] + 1]))
            q[i, lists.tokens[mine].long()] = 0
            rest = float(q[i].sum())
            mass[i] = mass[i] if rest else 0.0
            q[i] *= mass[i] / rest if rest else 0.0
        if options.get("normalize") and mass[i]:
            q[i] /= mass[i]
        if "floor" in options:
            q[i] = (1 - float(options["floor"].sum())) * q[i] + options["floor"]
    return q, torch.tensor(mass), torch.tensor(uncertainty)
