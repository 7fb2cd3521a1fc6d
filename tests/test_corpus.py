import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chassis.errors import ChassisError
from chassis.text.corpus import Document, document_id, load_documents, split_documents, split_of
from hypothesis import given
from hypothesis import strategies as st

FRACTIONS = {"fit": 0.8, "validation": 0.1, "test": 0.1}


def texts_of(documents):
    return [d.text for d in documents]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_plain_files_are_one_document_each(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo ñ", encoding="utf-8")
    (tmp_path / "b.md").write_text("# three", encoding="utf-8")
    documents = list(load_documents([tmp_path / "a.txt", str(tmp_path / "b.md")]))
    assert texts_of(documents) == ["one\n\ntwo ñ", "# three"]
    assert documents[0].source == str(tmp_path / "a.txt") and documents[0].id == document_id("one\n\ntwo ñ")


def test_line_endings_and_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert texts_of(load_documents(tmp_path / "a.txt")) == ["one\r\ntwo"]


def test_folder_is_searched_for_known_kinds(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "b.py").write_text("b = 1")
    (tmp_path / "deep" / "empty.py").touch()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "y"}])
    assert texts_of(load_documents(tmp_path)) == ["x", "y", "b = 1"]


def test_jsonl_and_parquet_give_the_same_documents(tmp_path):
    rows = [{"body": f"text {i}", "n": i} for i in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    write_jsonl(tmp_path / "a.jsonl", rows)
    one, other = (list(load_documents(tmp_path / f"a.{kind}", text_column="body")) for kind in ("jsonl", "parquet"))
    assert [d.id for d in one] == [d.id for d in other] and len(one) == 100


def test_exact_copies_are_dropped_and_counted(tmp_path):
    documents = load_documents(write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in ["x", "y", "x", " \n", "x", None]]))
    for _ in range(2):
        assert texts_of(documents) == ["x", "y"]
        assert (documents.duplicates, documents.blank) == (2, 2)


def test_limit_stops_early_and_reads_lazily(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(9)])
    path.write_bytes(path.read_bytes() + b"\xff\n")
    assert texts_of(load_documents(path, limit=3)) == ["0", "1", "2"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_hub_is_read_through_datasets(monkeypatch, split):
    def load_dataset(name, config, *, split, streaming):
        assert (name, config, streaming) == ("owner/name", "config", True)
        return iter([{"text": f"{split} 0"}, {"text": f"{split} 1"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    documents = list(load_documents("hf://owner/name:config", split=split))
    assert texts_of(documents) == [f"{split} 0", f"{split} 1"]
    assert documents[1].source == f"hf://owner/name:config/{split}:1"


def test_a_dataset_repository_is_streamed_by_its_card(tmp_path):
    """By the datasets library itself: a copy of a repository on disk is read like one on the hub."""
    card = "configs:\n- config_name: small\n  data_files:\n"
    for split in ("train", "test"):
        rows = [{"body": f"{split} {i}", "n": i} for i in range(3)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}-00000-of-00001.parquet")
        card += f"  - split: {split}\n    path: {split}-*.parquet\n"
    (tmp_path / "README.md").write_text(f"---\n{card}---\n")
    source = f"hf://{tmp_path}:small"
    documents = list(load_documents(source, split="test", text_column="body", limit=2))
    assert texts_of(documents) == ["test 0", "test 1"] and documents[1].source == f"{source}/test:1"
    with pytest.raises(ChassisError, match="no text column 'text'; the columns present are 'body', 'n'"):
        list(load_documents(source))
    for wrong, named in ((f"{source}er", "smaller"), (source, "absent")):
        with pytest.raises(ChassisError, match=f"cannot read split .*{named}"):
            list(load_documents(wrong, split="absent"))


def test_unreachable_hub(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route to host\nlong details")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ChassisError, match=r"hf://owner/name: .*\(no route to host\).*network.*give the path"):
        list(load_documents("hf://owner/name"))


def test_missing_path_is_told_at_once(tmp_path):
    with pytest.raises(ChassisError, match="absent.txt: no such file"):
        load_documents([tmp_path / "absent.txt"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.txt", b" \n\t", "no documents in .*a.txt: 1 were blank"),
        ("a.txt", b"good \xe9vil", "byte 0xe9 at offset 5 is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "byte 0xff at offset 24"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl:2: not JSON \(Expecting value at column 9\)"),
        ("a.jsonl", b'{"body": "x", "n": 1}\n', "no text column 'text'; the columns present are 'body', 'n'"),
        ("a.jsonl", b'["x"]\n', "the columns present are none"),
        ("a.jsonl", b'{"text": 5}\n', "holds int, expected a string"),
        ("a.parquet", b"not parquet at all", "not a readable Parquet file"),
        ("a.bin", b"x", "unknown kind of file"),
    ],
)
def test_bad_files_are_named_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ChassisError, match=message):
        list(load_documents(tmp_path / name))


def test_absent_parquet_column_names_the_columns_present(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ChassisError, match="no text column 'text'; the columns present are 'body', 'n'"):
        list(load_documents(tmp_path / "a.parquet"))


def test_folder_without_documents(tmp_path):
    with pytest.raises(ChassisError, match="no documents in this folder"):
        load_documents(tmp_path)


def test_no_source_and_negative_limit(tmp_path):
    with pytest.raises(ChassisError, match="no source"):
        load_documents([])
    with pytest.raises(ChassisError, match="limit=0"):
        load_documents(tmp_path, limit=0)


def make(n):
    return [Document.from_text(f"document {i}", "made") for i in range(n)]


def test_splits_do_not_change_with_order_or_company():
    documents = make(500)
    where = {d.id: name for name, part in split_documents(documents).items() for d in part}
    shuffled = documents[:250]
    random.Random(0).shuffle(shuffled)
    for name, part in split_documents(shuffled).items():
        assert all(where[d.id] == name == split_of(d.id) for d in part)


def test_split_shares_are_met_and_disjoint():
    parts = split_documents(make(5000), FRACTIONS)
    assert sum(map(len, parts.values())) == 5000
    for name, share in FRACTIONS.items():
        # Five standard deviations of a binomial share.
        assert abs(len(parts[name]) / 5000 - share) < 5 * (share * (1 - share) / 5000) ** 0.5


def test_salt_draws_another_split():
    ids = [d.id for d in make(200)]
    assert [split_of(i, FRACTIONS, "a") for i in ids] != [split_of(i, FRACTIONS, "b") for i in ids]


def test_every_split_is_a_key():
    assert split_documents([], FRACTIONS) == {"fit": [], "validation": [], "test": []}
    assert split_of("0", {"none": 0.0, "all": 1.0}) == "all"


@pytest.mark.parametrize("fractions", [{}, {"fit": 0.5}, {"fit": 1.5, "test": -0.5}])
def test_fractions_that_are_not_shares_are_refused(fractions):
    with pytest.raises(ChassisError, match="sum to 1"):
        split_of("0", fractions)


@given(st.text())
def test_id_depends_on_the_text_alone(text):
    assert Document.from_text(text, "here").id == Document.from_text(text, "there").id == document_id(text)
    assert len(document_id(text)) == 16
