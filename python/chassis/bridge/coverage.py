"""What a bridge or a projection reaches: a heat map of token lengths, and sample rows.

The heat map shows where the weight of rows goes: column x are the tokens of x bytes on the side that rows are of, each token
counting the same; cell (x, y) is the share of their weight that tokens of y bytes on the other side have, "none" the rest.
"""

from __future__ import annotations

import io
import re
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from chassis.figures import CLOSED, STYLE
from chassis.text.token_bytes import TokenBytes
from chassis_kernels import BridgeTable, SparseProjection

LONGEST = 14  # bytes; longer tokens share the last row and column
SHOWN = 0.045  # shares from here on are written into their cells
REACHED = 4  # tokens of a sample row


class Links(NamedTuple):
    """Entries (row, column, weight) between the tokens of two sides, `names` of which are for people."""

    rows: np.ndarray
    columns: np.ndarray
    weights: np.ndarray
    sides: tuple[TokenBytes, TokenBytes]
    names: tuple[str, str]


def bridge_links(table: BridgeTable, expert: TokenBytes, base: TokenBytes) -> Links:
    """The rows of expert tokens; those of residuals are left out."""
    kept = table.rows < expert.n_tokens
    entries = (part[kept].numpy() for part in (table.rows, table.ids.long(), table.weights.double()))
    return Links(*entries, (expert, base), ("expert", "base"))


def projection_links(projection: SparseProjection, student: TokenBytes, teacher: TokenBytes) -> Links:
    """The rows of student tokens."""
    stored = projection.indices >= 0
    entries = stored.nonzero()[:, 0], projection.indices[stored], projection.weights[stored].double()
    return Links(*(part.numpy() for part in entries), (student, teacher), ("student", "teacher"))


def shares_by_length(links: Links) -> np.ndarray:
    """[LONGEST, LONGEST + 1]: of rows of x + 1 bytes, the share that goes to tokens of y bytes; y = 0: to none."""
    row_lengths, lengths = (np.minimum(side.lengths, LONGEST) for side in links.sides)
    text = links.sides[0].is_text & (row_lengths > 0)
    kept = text[links.rows] & links.sides[1].is_text[links.columns]
    rows, columns, weights = (part[kept] for part in links[:3])
    place = (row_lengths[rows] - 1) * (LONGEST + 1) + lengths[columns]
    shares = np.bincount(place, weights=weights, minlength=LONGEST * (LONGEST + 1)).reshape(LONGEST, LONGEST + 1)
    tokens = np.bincount(row_lengths[text] - 1, minlength=LONGEST)[:, None]
    shares = np.divide(shares, tokens, out=np.zeros_like(shares), where=tokens > 0)
    shares[:, 0] = np.where(tokens[:, 0] > 0, 1 - shares.sum(1), 0)
    return shares.clip(0, 1)


def heat_map(links: Links) -> bytes:
    """`shares_by_length` as a picture, PNG."""
    shares = shares_by_length(links)
    colours = LinearSegmentedColormap.from_list("share", ["#ffffff", CLOSED])
    with rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(7.4, 5.6), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(100 * shares.T, origin="lower", cmap=colours, vmin=0, vmax=100, aspect="auto")
        for x, y in np.argwhere(shares >= SHOWN).tolist():
            shade = "white" if shares[x, y] > 0.6 else "#333a42"
            axes.text(x, y, f"{100 * shares[x, y]:.0f}", ha="center", va="center", fontsize=8, color=shade)
        lengths = [str(n) for n in range(1, LONGEST)] + [f"{LONGEST}+"]
        axes.set_xticks(range(LONGEST), lengths)
        axes.set_yticks(range(LONGEST + 1), ["none", *lengths])
        one, other = links.names
        axes.set(title=f"Where the weight of the {one}'s tokens goes, %", xlabel=f"bytes of the {one}'s token")
        axes.set_ylabel(f"bytes of the {other}'s tokens it reaches")
        figure.colorbar(image, ax=axes, shrink=0.7).outline.set_visible(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def sample_rows(links: Links, n: int = 12) -> list[list[str]]:
    """[token, the tokens it reaches with their weights, heaviest first]: n rows with several entries, evenly spread."""
    order = np.lexsort((-links.weights, links.rows))
    rows, columns, weights = (part[order] for part in links[:3])
    text = links.sides[0].is_text
    numbers, start, count = np.unique(rows, return_index=True, return_counts=True)
    many = np.flatnonzero((count > 1) & text[numbers])
    many = many if len(many) else np.flatnonzero(text[numbers])
    found = []
    for i in many[:: max(1, len(many) // n)][:n].tolist():
        span = slice(start[i], start[i] + min(count[i], REACHED))
        pairs = zip(columns[span].tolist(), weights[span].tolist(), strict=True)
        reached = "  ".join(f"{shown(links.sides[1], column)} {weight:.3f}" for column, weight in pairs)
        found.append([shown(links.sides[0], int(numbers[i])), reached + ("  …" if count[i] > REACHED else "")])
    return found


def shown(tokens: TokenBytes, index: int) -> str:
    """A token for people: its text in quotes, bytes that are no text as <0xC2>, or the name of a special one."""
    if not tokens.is_text[index]:
        return tokens.content[index]
    text = tokens.bytes[index].decode(errors="surrogateescape")
    spelt = re.sub("[\udc80-\udcff]", lambda found: f"<0x{ord(found[0]) - 0xDC00:02X}>", text)
    return spelt if "\udc80" <= min(text) <= "\udcff" else repr(spelt)
