"""Projections from two tokenizers and from text, and the files that hold them."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from chassis.bridge.projection import (
    STEPS,
    build_projection,
    canonical,
    counted_projection,
    embedding_projection,
    exact_pairs,
    similarity,
)
from chassis.bridge.projection_file import load_projection, save_projection
from chassis.errors import BridgeError
from chassis.testbed.tokenizers import byte_level, sentencepiece_style
from chassis.text.token_bytes import TokenBytes
from tokenizers import normalizers

from chassis_kernels import SparseProjection

TEXT = "the quick brown fox jumps over the lazy dog; def f(x):\n    return random.choice(x) + 1\n"


@pytest.fixture(scope="module")
def pair():
    tokenizers = sentencepiece_style([TEXT] * 8, 360), byte_level([TEXT, "random quicksand jumping " * 3] * 8, 330)
    return tuple(TokenBytes.from_tokenizer(t) for t in tokenizers)


def row(projection, index):
    return {
        j: w for j, w in zip(projection.indices[index].tolist(), projection.weights[index].tolist(), strict=True) if j >= 0
    }


def test_tokens_of_equal_bytes_are_pinned(pair):
    student, teacher = pair
    projection, exact = build_projection(student, teacher), exact_pairs(student, teacher)
    assert len(exact.rows) > 250
    for i, j in zip(exact.rows.tolist(), exact.columns.tolist(), strict=True):
        assert student.bytes[i] == teacher.bytes[j] and row(projection, i) == {j: 1.0}
        assert projection.indices[i, 1] == -1  # as the strict exact map wants it
    ids, _ = projection.exact_map()
    assert set(exact.rows.tolist()) <= set(ids.tolist())
    assert not projection.indices[[i for i in range(3, 259) if i not in canonical(student)]].ge(0).any()


def test_other_rows_are_spellings_from_both_sides(pair):
    student, teacher = pair
    projection = build_projection(student, teacher, k=4)
    pinned = set(exact_pairs(student, teacher).rows.tolist())
    free = [i for i in canonical(student) if i not in pinned]
    assert free
    for i in free:
        expected: dict[int, float] = {}
        for step, j in zip(STEPS, teacher.ids_of([student.bytes[i].decode()])[0], strict=False):
            expected[j] = expected.get(j, 0.0) + step
        for j in canonical(teacher):
            text = teacher.bytes[j].decode(errors="ignore")
            if text.encode() != teacher.bytes[j]:
                continue
            for step, s in zip(STEPS, student.ids_of([text])[0], strict=False):
                if s == i:
                    expected[j] = expected.get(j, 0.0) + step
        kept = dict(sorted(expected.items(), key=lambda item: (-item[1], item[0]))[:4])
        total = sum(kept.values())
        assert row(projection, i) == pytest.approx({j: w / total for j, w in kept.items()}, rel=1e-5)


def test_special_tokens_pair_by_role_then_by_spelling(pair):
    student, teacher = pair
    projection = build_projection(student, teacher)
    assert row(projection, student.roles["eos"]) == {teacher.roles["eos"]: 1.0}
    assert similarity("<|im_end|>", "<|im_end|>") == 1.0 and similarity("<pad>", "@@") < 0.3


def test_no_column_is_filled_with_one_id(pair):
    report = build_projection(*pair).report()
    assert report.last_column_share < 0.5 and report.duplicates == 0
    assert report.row_sum_min == pytest.approx(1, abs=1e-5) and report.row_sum_max == pytest.approx(1, abs=1e-5)


def test_counted_rows_are_the_counts_at_common_starts(pair):
    student, teacher = pair
    text = "random choice random fox\n" * 3
    projection = counted_projection(student, teacher, [text], k=8, prior=0.0)
    a, b = student.encode(text), teacher.encode(text)
    starts = [dict(zip([0, *e.ends[:-1].tolist()], e.ids.tolist(), strict=True)) for e in (a, b)]
    counts: dict[int, dict[int, int]] = {}
    for byte in set(starts[0]) & set(starts[1]):
        one = counts.setdefault(starts[0][byte], {})
        one[starts[1][byte]] = one.get(starts[1][byte], 0) + 1
    for i, found in counts.items():
        total = sum(found.values())
        assert row(projection, i) == pytest.approx({j: n / total for j, n in found.items()}, rel=1e-5)


def test_nothing_counted_and_normalizers_that_never_agree_are_refused(pair):
    student, teacher = pair
    for texts in ([], [""]):
        with pytest.raises(BridgeError, match="no text to count on: give texts"):
            counted_projection(student, teacher, texts)
    shouting = byte_level([TEXT.upper()] * 3, 300).backend_tokenizer
    shouting.normalizer = normalizers.Replace("q", "qq")
    with pytest.raises(BridgeError, match="normalizers do not agree on 'the q"):
        counted_projection(student, TokenBytes.from_tokenizer(shouting, check=False), [TEXT])


def test_embedding_rows_find_the_rotated_token(pair):
    student, teacher = pair
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(teacher.n_tokens, 12, generator=generator)
    rows = torch.randn(student.n_tokens, 12, generator=generator)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    exact = exact_pairs(student, teacher)
    rows[torch.from_numpy(exact.rows)] = vectors[torch.from_numpy(exact.columns)] @ turn
    pinned = set(exact.rows.tolist())
    free = next(i for i in canonical(student) if i not in pinned)
    twin = next(j for j in np.flatnonzero(teacher.is_text).tolist() if j not in set(exact.columns.tolist()))
    rows[free] = vectors[twin] @ turn
    projection = embedding_projection(student, teacher, rows, vectors)
    assert int(projection.indices[free, 0]) == twin
    with pytest.raises(BridgeError, match="to fit a map of width 300"):
        embedding_projection(student, teacher, torch.randn(student.n_tokens, 300), vectors)


@pytest.mark.parametrize("layout,suffix", [("ours", "safetensors"), ("dense", "pt"), ("sparse", "pt")])
def test_every_layout_comes_back(pair, tmp_path, layout, suffix):
    student, teacher = pair
    projection = build_projection(student, teacher)
    path = save_projection(projection, tmp_path / f"p.{suffix}", hashes=("a", "b"), layout=layout)
    found = load_projection(path, student.n_tokens, teacher.n_tokens, hashes=("a", "b"))
    assert found.layout == layout and found.notices == []
    assert torch.equal(found.projection.dense(), projection.dense())


def test_bad_files_are_refused_each_by_name(pair, tmp_path):
    n, m = 3, 5
    good = {"indices": torch.tensor([[0, 1], [2, -1], [4, -1]]), "likelihoods": torch.tensor([[0.5, 0.5], [1, 0], [1, 0]])}

    def refused(name, content, message, **options):
        if content is not None:
            torch.save(content, tmp_path / name)
        with pytest.raises(BridgeError, match=message):
            load_projection(tmp_path / name, n, m, **options)

    refused("missing.pt", None, "no such projection file")
    refused("list.pt", [1], "unknown layout")
    refused("other.pt", {"map": good["indices"]}, "unknown layout")
    refused("rows.pt", {k: v[:2] for k, v in good.items()}, r"expected both \[3, K\]")
    refused("shape.pt", good | {"likelihoods": torch.ones(3, 1)}, r"expected both \[3, K\]")
    refused("range.pt", good | {"indices": good["indices"] + 2}, "ids are outside")
    refused("nan.pt", good | {"likelihoods": good["likelihoods"] * torch.nan}, "NaN")
    refused("negative.pt", good | {"likelihoods": -good["likelihoods"]}, "negative")
    refused("gold.pt", {(0, 1): 1.0}, "gold_loss needs", gold=True)
    refused("student.pt", {(9, 1): 1.0}, "student ids from 9 to 9")
    (tmp_path / "text.pt").write_text("hello")
    refused("text.pt", None, "not a torch file of plain tensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    refused("cut.safetensors", None, "damaged")
    projection = SparseProjection(good["indices"], good["likelihoods"], m)
    save_projection(projection, tmp_path / "ours.safetensors", hashes=("a", "b"))
    refused("ours.safetensors", None, "made for another teacher's tokenizer", hashes=("a", "c"))
    with pytest.raises(BridgeError, match="layout ours ends in .safetensors"):
        save_projection(projection, tmp_path / "ours.pt", hashes=("a", "b"))


def test_a_torch_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"indices": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(BridgeError, match="not a torch file of plain tensors"):
        load_projection(tmp_path / "evil.pt", 1, 1)


def test_suspect_files_are_noticed_by_name(tmp_path):
    indices = torch.tensor([[0, 0, 7], [1, 2, 7], [3, 4, 7], [-1, -1, -1]])
    torch.save({"indices": indices, "likelihoods": torch.full((4, 3), 0.5)}, tmp_path / "p.pt")
    notices = load_projection(tmp_path / "p.pt", 4, 8).notices
    assert [notice.split(":")[0] for notice in notices] == ["duplicate ids", "row sums", "constant last column"]


LARGE = """
import resource
from chassis.bridge.projection import build_projection
from chassis.testbed.tokenizers import synthetic_bpe
from chassis.text.token_bytes import TokenBytes

student, teacher = (TokenBytes.from_tokenizer(synthetic_bpe(n, seed)) for n, seed in ((128_000, 0), (152_000, 1)))
projection = build_projection(student, teacher)
print(*projection.shape, projection.report().empty_rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_large_vocabularies_need_no_dense_matrix():
    """The peak of a process of its own, libraries included; a dense matrix would take 78 GB."""
    found = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    *shape, empty, kilobytes = map(int, found.stdout.split())
    assert shape == [128_000, 152_000] and empty == 0
    assert kilobytes * 1024 < 2e9
