"""What the commands read: positions, texts, chats, and vectors from parquet, npy and npz."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_jax.errors import InputError, VectorError
from nla_jax.tools.inputs import check_marker, parse_indices, read_chat, read_source, read_text, read_texts
from nla_jax.tools.vectors import read_vectors

# -- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("0", [0]),
        ("-1", [9]),
        ("3,1,3,-7", [3, 1]),
        ("7:", [7, 8, 9]),
        (":2, 9", [0, 1, 9]),
        ("-2:", [8, 9]),
        ("8:100", [8, 9]),
        ("::-4", [9, 5, 1]),
        ("1:8:3,0:3", [1, 4, 7, 0, 2]),
        (":", list(range(10))),
        ("+2", [2]),
    ],
)
def test_positions(spec, expected):
    assert parse_indices(spec, 10) == expected


@given(st.integers(1, 30), *[st.none() | st.integers(-40, 40)] * 2, st.none() | st.integers(-5, 5).filter(bool))
def test_slices_are_those_of_python(length, start, stop, step):
    spec = ":".join("" if part is None else str(part) for part in (start, stop, step))
    expected = list("x" * length)
    expected = [i for i, _ in list(enumerate(expected))[start:stop:step]]
    if expected:
        assert parse_indices(spec, length) == expected
    else:
        with pytest.raises(InputError, match="select nothing"):
            parse_indices(spec, length)


@pytest.mark.parametrize("spec", ["", "a", "1,,2", "1.5", "1:2:3:4", "0x3", "٣", "1 2", "9" * 5000, "::0", "--1"])
def test_bad_positions_are_one_line(spec):
    with pytest.raises(InputError) as error:
        parse_indices(spec, 10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["10", "-11", "3,99"])
def test_a_position_out_of_range_names_the_range(spec):
    with pytest.raises(InputError, match=r"out of range: expected -10\.\.9 \(10 positions\)"):
        parse_indices(spec, 10)


# -- texts and chats ------------------------------------------------------------------------------------------------


def test_one_source_and_only_one(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("x")
    for given_ in ((None, None, None), ("x", file, None), ("x", None, file), (None, file, file)):
        with pytest.raises(InputError, match="one of TEXT, --file, --chat"):
            read_source(*given_)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a\n", "a"),
        (b"a\r\n", "a"),
        (b"a\n\n", "a\n"),
        (b"\xef\xbb\xbfa b", "a b"),
        (b"a\r\nb\tc \xe2\x80\xa8d", "a\r\nb\tc \u2028d"),
        (b"", ""),
    ],
)
def test_a_file_is_kept_but_for_its_last_line_end(tmp_path, data, text):
    (tmp_path / "a.txt").write_bytes(data)
    assert read_text(tmp_path / "a.txt") == text


def test_a_file_that_is_not_utf8_names_the_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(InputError, match=r"expected UTF-8, got byte 0xe9 at offset 3"):
        read_text(tmp_path / "a.txt")


def test_both_chat_shapes(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "yo"}]}]
    for value in (messages, {"messages": messages, "id": 3}):
        (tmp_path / "c.json").write_text(json.dumps(value))
        assert read_chat(tmp_path / "c.json") == messages


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"role": "user"}', "chat: expected a list"),
        ("[]", "got an empty list"),
        ('["hi"]', "message 0: expected"),
        ('[{"role": "user", "content": "a"}, {"role": "assitant", "content": "b"}]', "message 1: role: expected"),
        ('[{"content": "a"}]', "message 0: role"),
        ('[{"role": "user"}]', "message 0: content: .* got no content"),
        ('[{"role": "user", "content": 3}]', "message 0: content"),
        ('[{"role": "user", "content": []}]', "message 0: content"),
        ('[{"role": "user", "content": [{"type": "image", "url": "x"}]}]', "message 0: content"),
        ('[{"from": "human", "value": "a"}]', "renaming them"),
    ],
)
def test_bad_chats(tmp_path, content, message):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_chat(tmp_path / "c.json")


def test_the_marker_is_found_where_it_stands():
    check_marker("plain ( text", "㈎")
    with pytest.raises(InputError, match=r"the text holds '㈎' at character 6 \(line 2, column 3\)"):
        check_marker("abc\nd ㈎", "㈎")
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "x㈎"}]
    with pytest.raises(InputError, match=r"chat message 1 holds '㈎' at character 1 \(line 1, column 2\)"):
        check_marker([{"role": "user", "content": "a"}, {"role": "user", "content": parts}], "㈎")


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", "one\n\nthree\u2028still three\r\n", ["one", "", "three\u2028still three"]),
        ("a.jsonl", '{"text": "one", "n": 1}\n\n"two"\n', ["one", "two"]),
        ("a.json", '["one", {"text": "two"}]', ["one", "two"]),
        ("a.json", '{"explanations": [{"text": "one"}]}', ["one"]),
    ],
)
def test_texts(tmp_path, name, content, texts):
    (tmp_path / name).write_bytes(content.encode())
    assert read_texts(tmp_path / name) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x", "expected .txt"),
        ("a.txt", "", "at least one"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "line 2"),
        ("a.jsonl", '{"text": "a"}\n{"text":', "line 2: not readable as JSON"),
        ("a.json", '{"a": 1}', "the keys a"),
        ("a.json", '["a", null]', "row 1"),
        ("a.parquet", "PAR1 not really", "not readable as parquet"),
    ],
)
def test_bad_texts(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_texts(tmp_path / name)


# -- vectors --------------------------------------------------------------------------------------------------------

N, D = 23, 6
TRUE = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)


def _column(array: np.ndarray, kind: str) -> pa.Array:
    flat = pa.array(array.reshape(-1))
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
    offsets = np.arange(len(array) + 1) * array.shape[1]
    if kind == "list":
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), flat)
    return pa.LargeListArray.from_arrays(pa.array(offsets), flat)


def _parquet(path: Path, column: pa.Array, name: str = "activation_vector", row_group_size: int = 4) -> Path:
    table = pa.table({"n_raw_tokens": pa.array(range(len(column))), name: column})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("kind", ["fixed", "list", "large"])
def test_parquet_vectors(tmp_path, kind, dtype):
    stored = TRUE.astype(dtype)
    path = _parquet(tmp_path / "v.parquet", _column(stored, kind))
    vectors, rows = read_vectors(path, d_model=D)
    assert vectors.dtype == np.float32 and vectors.flags.c_contiguous
    np.testing.assert_array_equal(vectors, stored.astype(np.float32))
    np.testing.assert_array_equal(rows, np.arange(N))
    vectors, rows = read_vectors(path, rows="20,3:5,-1,0", d_model=D)  # across row groups, out of order
    assert rows.tolist() == [20, 3, 4, 22, 0]
    np.testing.assert_array_equal(vectors, stored[rows].astype(np.float32))


def test_more_rows_than_one_batch(tmp_path):
    many = np.random.default_rng(1).normal(size=(5000, 3)).astype(np.float32)
    path = _parquet(tmp_path / "v.parquet", _column(many, "fixed"), row_group_size=4500)
    np.testing.assert_array_equal(read_vectors(path)[0], many)
    vectors, rows = read_vectors(path, rows="4999,::1000")
    np.testing.assert_array_equal(vectors, many[[4999, 0, 1000, 2000, 3000, 4000]])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_npy_and_npz_vectors(tmp_path, dtype):
    stored = TRUE.astype(dtype)
    np.save(tmp_path / "v.npy", np.asfortranarray(stored))
    np.savez_compressed(tmp_path / "v.npz", a=stored[:2], activation_vector=stored)
    for path, column in ((tmp_path / "v.npy", None), (tmp_path / "v.npz", None), (tmp_path / "v.npz", "a")):
        vectors, rows = read_vectors(path, column=column, rows="1,0", d_model=D)
        np.testing.assert_array_equal(vectors, stored[[1, 0]].astype(np.float32))
        assert vectors.dtype == np.float32 and rows.tolist() == [1, 0]
    np.save(tmp_path / "one.npy", stored[3])
    assert read_vectors(tmp_path / "one.npy")[0].shape == (1, D)


def _bad_row(value: float) -> np.ndarray:
    bad = TRUE.copy()
    bad[7] = value
    return bad


@pytest.mark.parametrize(("value", "message"), [(np.nan, "NaN"), (np.inf, "infinite"), (0, "all zero")])
@pytest.mark.parametrize("suffix", ["parquet", "npy"])
def test_a_bad_row_is_named_and_can_be_left_out(tmp_path, suffix, value, message):
    path = tmp_path / f"v.{suffix}"
    if suffix == "npy":
        np.save(path, _bad_row(value))
    else:
        _parquet(path, _column(_bad_row(value), "fixed"))
    with pytest.raises(VectorError, match=f"row 7 .*{message}"):
        read_vectors(path)
    with pytest.raises(VectorError, match="row 7 "):
        read_vectors(path, rows="5:9")
    assert len(read_vectors(path, rows="0:7,8:")[0]) == N - 1


def test_a_float64_that_float32_cannot_hold(tmp_path):
    big = TRUE.astype(np.float64)
    big[4, 2] = 1e300
    np.save(tmp_path / "v.npy", big)
    with pytest.raises(VectorError, match="row 4 has NaN or infinite"):
        read_vectors(tmp_path / "v.npy")


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([[1.0, 2.0], [3.0]], pa.list_(pa.float32()), r"row 1: expected 2 numbers \(D\), got 1 numbers"),
        ([[1.0, 2.0], None], pa.list_(pa.float32()), "row 1 is null"),
        ([[1.0, 2.0], None], pa.list_(pa.float32(), 2), "row 1 is null"),
        ([[1.0, 2.0], [3.0, None]], pa.list_(pa.float64()), "row 1 has null entries"),
        ([[1.0, 2.0], [3.0, None]], pa.list_(pa.float32(), 2), "row 1 has null entries"),
        ([[], []], pa.list_(pa.float32()), "row 0: expected a vector, got an empty list"),
        ([1.0, 2.0], pa.float32(), "expected lists of"),
        (["a"], pa.string(), "expected lists of"),
        ([[1, 2]], pa.list_(pa.int32()), "expected lists of"),
        ([[[1.0]]], pa.list_(pa.list_(pa.float32())), "expected lists of"),
        ([], pa.list_(pa.float32()), "at least one row"),
    ],
)
def test_bad_parquet_columns(tmp_path, rows, kind, message):
    with pytest.raises(VectorError, match=message):
        read_vectors(_parquet(tmp_path / "v.parquet", pa.array(rows, kind)))


def test_a_missing_column_says_which_there_are(tmp_path):
    path = _parquet(tmp_path / "v.parquet", _column(TRUE, "fixed"), name="h")
    with pytest.raises(VectorError, match=r"no column 'activation_vector': got n_raw_tokens, h\. Try: --column h"):
        read_vectors(path)
    assert read_vectors(path, column="h")[0].shape == (N, D)


def test_another_width_than_the_model(tmp_path):
    np.save(tmp_path / "v.npy", TRUE)
    for path in (tmp_path / "v.npy", _parquet(tmp_path / "v.parquet", _column(TRUE, "list"))):
        with pytest.raises(VectorError, match=r"expected 7 .*, got 6"):
            read_vectors(path, d_model=7)


def test_row_out_of_range(tmp_path):
    np.save(tmp_path / "v.npy", TRUE)
    with pytest.raises(InputError, match="row 23 is out of range"):
        read_vectors(tmp_path / "v.npy", rows="23")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


@pytest.mark.parametrize("suffix", ["npy", "npz", "parquet"])
def test_damaged_files_are_one_line(tmp_path, suffix):
    path = tmp_path / f"v.{suffix}"
    if suffix == "npy":
        np.save(path, TRUE)
    elif suffix == "npz":
        np.savez(path, activation_vector=TRUE)
    else:
        _parquet(path, _column(TRUE, "fixed"))
    _truncate(path)
    for content in (path.read_bytes(), b"", b"not it at all" * 10):
        path.write_bytes(content)
        with pytest.raises(VectorError) as error:
            read_vectors(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value) and "pickle" not in str(error.value)


def test_pickles_are_never_read(tmp_path):
    np.save(tmp_path / "v.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(VectorError, match="not readable as .npy"):
        read_vectors(tmp_path / "v.npy")


@pytest.mark.parametrize(
    "array", [np.array(["a"]), np.zeros((2, 3, 4)), np.zeros((0, 4)), np.array(1.0), np.array([1j])]
)
def test_arrays_that_are_no_vectors(tmp_path, array):
    np.save(tmp_path / "v.npy", array)
    with pytest.raises(VectorError, match="expected"):
        read_vectors(tmp_path / "v.npy")


def test_bfloat16_npy_says_what_to_do(tmp_path):
    import ml_dtypes

    np.save(tmp_path / "v.npy", TRUE.astype(ml_dtypes.bfloat16))
    with pytest.raises(VectorError, match="saving as float32"):
        read_vectors(tmp_path / "v.npy")


def test_missing_files_and_foreign_suffixes(tmp_path):
    for name in ("v.npy", "v.npz", "v.parquet"):
        with pytest.raises(FileNotFoundError):
            read_vectors(tmp_path / name)
    with pytest.raises(InputError, match=r"expected \.parquet, \.npy or \.npz"):
        read_vectors(tmp_path / "v.pt")
