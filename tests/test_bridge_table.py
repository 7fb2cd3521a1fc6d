"""BridgeTable and BlockedTokens: the same entries however they are seen; what is broken is refused with counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chassis_kernels import BlockedTokens, BridgeTable

BUDGET = settings(max_examples=60, deadline=None, derandomize=True)


@given(rows=st.integers(1, 12), v_b=st.integers(1, 15), entries=st.integers(0, 30), seed=st.integers(0, 999))
@BUDGET
def test_every_view_holds_the_entries(rows, v_b, entries, seed):
    g = torch.Generator().manual_seed(seed)
    places = torch.randint(0, rows, (entries,), generator=g), torch.randint(0, v_b, (entries,), generator=g)
    weights = torch.rand(entries, generator=g) / 30 * (torch.rand(entries, generator=g) > 0.2)
    truth = torch.zeros(rows, v_b).index_put(places, weights, accumulate=True)
    table = BridgeTable.from_entries(*places, weights, (rows, v_b))
    torch.testing.assert_close(table.dense(), truth)
    torch.testing.assert_close(table.row_sum, truth.sum(1))
    torch.testing.assert_close(table.spread, 1 - truth.amax(1))
    start, ids, shares = table.columns
    by_column = torch.zeros(rows, v_b)
    for b in range(v_b):
        mine = slice(int(start[b]), int(start[b + 1]))
        by_column[ids[mine].long(), b] = shares[mine]
        assert (ids[mine].diff() > 0).all()
    torch.testing.assert_close(by_column, truth)
    assert table.columns is table.columns and table.n_expert == rows and (table.weights > 0).all()
    again = BridgeTable(table.start.int(), table.ids.long(), table.weights, v_b).to("cpu")
    assert torch.equal(again.dense(), table.dense())


def broken(start=(0, 2, 3), ids=(0, 1, 2), weights=(0.5, 0.5, 1.0), n_base=3, **options):
    return BridgeTable(torch.tensor(start), torch.tensor(ids), torch.tensor(weights), n_base, **options)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ids": (0, 1, 3)}, "1 of 3 ids are outside 0..2: from 0 to 3"),
        ({"ids": (0, -1, 2)}, "1 of 3 ids are outside 0..2: from -1 to 2"),
        ({"ids": (1, 1, 2)}, "1 ids repeat or precede"),
        ({"ids": (1, 0, 2)}, "from_entries sorts"),
        ({"ids": (0.0, 1.0, 2.0)}, "BridgeTable.ids is torch.float32"),
        ({"start": (0, 2, 4)}, r"ascend from 0 to 3, the number of ids: its ends are \[0, 4\]"),
        ({"start": (0, 4, 3)}, "ascend from 0 to 3"),
        ({"start": ()}, "BridgeTable.start is"),
        ({"weights": (0.5, float("nan"), 1.0)}, "1 are NaN or infinite and 0 negative"),
        ({"weights": (0.5, -0.5, 1.0)}, "0 are NaN or infinite and 1 negative"),
        ({"weights": (0.5, 0.6, 1.0)}, "1 of 2 rows sum to more than 1, up to 1.1"),
        ({"weights": (0.5, 0.5)}, r"weights are torch.float32 \(2,\), expected floats \(3,\)"),
        ({"n_expert": 3}, "n_expert is 3: expected 0..2"),
    ],
)
def test_broken_tables_are_refused_with_counts(changed, message):
    with pytest.raises(ValueError, match=message):
        broken(**changed)


def test_entries_outside_the_table_are_refused():
    one = torch.tensor([1])
    with pytest.raises(ValueError, match="rows hold 1 to 1: expected 0..0"):
        BridgeTable.from_entries(one, one, torch.ones(1), (1, 2))
    with pytest.raises(ValueError, match="ids hold 1 to 1: expected 0..0"):
        BridgeTable.from_entries(one, one, torch.ones(1), (2, 1))
    with pytest.raises(ValueError, match="1 are NaN"):
        BridgeTable.from_entries(one, one, torch.tensor([float("nan")]), (2, 2))


def test_shares_may_miss_one_by_rounding():
    thirds = torch.full((3,), 1 / 3).tolist()
    assert broken((0, 3), (0, 1, 2), thirds).row_sum.item() == pytest.approx(1)


def test_blocked_tokens_are_checked():
    lists = BlockedTokens(torch.tensor([0, 2, 2]), torch.tensor([4, 1]), 5)
    assert len(lists) == 2 and lists.to("cpu").tokens.dtype == torch.int32
    with pytest.raises(ValueError, match="1 of 2 tokens are outside 0..3"):
        BlockedTokens(lists.start, lists.tokens, 4)
