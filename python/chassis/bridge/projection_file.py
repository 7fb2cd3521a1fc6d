"""Projections on disk: our safetensors, and the two layouts in which others write them.

* ours: `indices` int32 and `weights` float32 [V_s, K], with the sizes and hashes of both tokenizers in the header;
* dense: a torch file {"indices": int [V_s, K], -1 empty, "likelihoods": float [V_s, K]};
* sparse: a torch file {(student id, teacher id): weight}.

Torch files are read with weights_only: they cannot run code.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from chassis.errors import BridgeError
from chassis.files import ensure_writable, write_file
from chassis_kernels import SparseProjection

LAYOUTS = ("ours", "dense", "sparse")
EMPTY_ROWS = 0.5  # share above which a file is suspect
LAST_COLUMN = 0.5


@dataclass
class ProjectionFile:
    """A projection that was read. `layout` as in LAYOUTS; `notices` say by name what looks wrong with it."""

    projection: SparseProjection
    layout: str
    notices: list[str] = field(default_factory=list)


def load_projection(
    path: str | Path, n_student: int, n_teacher: int, *, hashes: tuple[str, str] | None = None, gold: bool = False
) -> ProjectionFile:
    """Read a projection for tokenizers of these sizes; `hashes` are `vocabulary_hash` of the student's and the teacher's.

    Raises BridgeError, each with its own message: file missing or damaged, unknown layout, another number of rows, made for
    other tokenizers, ids out of range, NaN or negative weights, and `gold` with the sparse layout (whose rows have no
    stored order, which the gold map reads).
    """
    path = Path(path)
    if not path.is_file():
        raise BridgeError(f"{path}: no such projection file; build one with chassis bridge build STUDENT TEACHER")
    if path.suffix == ".safetensors":
        indices, weights = _read_ours(path, hashes)
        layout = "ours"
    else:
        indices, weights, layout = _read_torch(path, n_student)
    if gold and layout == "sparse":
        raise BridgeError(f"{path}: the sparse layout keeps no order within a row, which gold_loss needs: use the dense one")
    if indices.dim() != 2 or indices.shape != weights.shape or len(indices) != n_student:
        raise BridgeError(
            f"{path}: indices {tuple(indices.shape)} and weights {tuple(weights.shape)}, expected both [{n_student}, K],"
            " a row for each student token"
        )
    try:
        projection = SparseProjection(indices, weights, n_teacher)
    except ValueError as error:
        raise BridgeError(f"{path}: {error}") from error
    return ProjectionFile(projection, layout, notices(projection))


def save_projection(
    projection: SparseProjection, path: str | Path, *, hashes: tuple[str, str], layout: str = "ours"
) -> Path:
    """Write a projection in one of LAYOUTS; ours and only ours remembers the tokenizers."""
    path = Path(path)
    if layout not in LAYOUTS:
        raise BridgeError(f"layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    if (layout == "ours") != (path.suffix == ".safetensors"):
        raise BridgeError(f"{path}: layout {layout} ends in {'.safetensors' if layout == 'ours' else '.pt'}")
    ensure_writable(path.parent)
    if layout == "ours":
        tensors = {"indices": projection.indices.to(torch.int32), "weights": projection.weights.float()}
        about = {"student": hashes[0], "teacher": hashes[1], "n_teacher": str(projection.n_teacher)}
        return write_file(path, tensors, metadata=about)
    buffer = io.BytesIO()
    if layout == "dense":
        torch.save({"indices": projection.indices, "likelihoods": projection.weights}, buffer)
    else:
        stored = projection.indices >= 0
        rows = stored.nonzero()[:, 0].tolist()
        columns, values = projection.indices[stored].tolist(), projection.weights[stored].tolist()
        torch.save({(r, c): v for r, c, v in zip(rows, columns, values, strict=True)}, buffer)
    return write_file(path, buffer.getvalue())


def notices(projection: SparseProjection) -> list[str]:
    """What is wrong or suspect in a projection, one sentence each."""
    report, found = projection.report(), []
    if report.duplicates:
        found.append(f"duplicate ids: {report.duplicates} entries repeat an id of their row; they add up")
    if report.entries and (report.row_sum_min < 0.99 or report.row_sum_max > 1.01):
        found.append(f"row sums: from {report.row_sum_min:.3g} to {report.row_sum_max:.3g}, expected 1")
    if report.rows and report.empty_rows / report.rows > EMPTY_ROWS:
        found.append(f"empty rows: {report.empty_rows} of {report.rows} student tokens reach no teacher token")
    if report.last_column_share > LAST_COLUMN and report.entries > report.rows:
        found.append(f"constant last column: one id fills {report.last_column_share:.0%} of it, as padding would")
    return found


def _read_ours(path: Path, hashes: tuple[str, str] | None) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            about, names = file.metadata() or {}, set(file.keys())
            if not {"indices", "weights"} <= names:
                raise BridgeError(f"{path}: unknown layout: it holds {sorted(names)}, expected indices and weights")
            tensors = file.get_tensor("indices"), file.get_tensor("weights")
    except (SafetensorError, OSError) as error:
        raise BridgeError(f"{path}: damaged ({error}); build it again") from error
    for side, given in zip(("student", "teacher"), hashes or (), strict=False):
        if about.get(side, given) != given:
            raise BridgeError(f"{path}: made for another {side}'s tokenizer; build one for these two")
    return tensors


def _read_torch(path: Path, n_student: int) -> tuple[torch.Tensor, torch.Tensor, str]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle make its reader fail in any way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BridgeError(f"{path}: not a torch file of plain tensors ({reason})") from error
    if isinstance(content, dict) and isinstance(content.get("indices"), torch.Tensor):
        weights = content.get("likelihoods")
        if isinstance(weights, torch.Tensor):
            return content["indices"], weights, "dense"
    if isinstance(content, dict) and content and all(isinstance(key, tuple) and len(key) == 2 for key in content):
        return *_from_pairs(path, content, n_student), "sparse"
    keys = sorted(map(str, content))[:4] if isinstance(content, dict) else type(content).__name__
    raise BridgeError(
        f"{path}: unknown layout ({keys}): expected indices and likelihoods, or weights by (student, teacher) pairs"
    )


def _from_pairs(path: Path, content: dict, n_student: int) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = np.array(list(content), dtype=np.int64)
    values = np.array([float(value) for value in content.values()], dtype=np.float32)
    low, high = int(pairs[:, 0].min()), int(pairs[:, 0].max())
    if low < 0 or high >= n_student:
        raise BridgeError(f"{path}: student ids from {low} to {high}, but there are {n_student} student tokens")
    order = np.lexsort((pairs[:, 1], -values, pairs[:, 0]))
    rows, columns, values = pairs[order, 0], pairs[order, 1], values[order]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    shape = n_student, int(rank.max()) + 1
    indices, weights = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    indices[rows, rank], weights[rows, rank] = columns, values
    return torch.from_numpy(indices), torch.from_numpy(weights)
