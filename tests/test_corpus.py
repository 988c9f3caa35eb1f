"""Corpora: every format, everything that can be wrong in one, and tokens that keep roles and text ends."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import DATA, GEMMA_CHAT, LLAMA_CONFIG, MISTRAL, QWEN, llama_like, needs_data, write

from nla_jax.corpus import MAX_CHARS, Corpus, Document, open_corpus, tokenize_document
from nla_jax.corpus_files import MAX_LINE
from nla_jax.errors import HubError, InputError, NLAError, PromptError
from nla_jax.tokenizer import Tokenizer

TEXTS = ["one  two\n", "ünïcode 日本 🙂", 'quotes " and \\ and \u2028', "last"]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def lines(path: Path, *items: object) -> Path:
    data = b"".join(i if isinstance(i, bytes) else json.dumps(i).encode() + b"\n" for i in items)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(data)
    return path


def texts(corpus: Corpus) -> list[str | None]:
    return [d.text for d in corpus]


def ids(corpus: Corpus) -> list[str]:
    return [d.doc_id for d in corpus]


# Formats


def write_jsonl(path: Path) -> Path:
    return lines(path / "c.jsonl", *({"text": t} for t in TEXTS))


def write_gz(path: Path) -> Path:
    """Two gzip members one after another, as tools that append make them."""
    parts = [
        gzip.compress(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in p)) for p in (TEXTS[:2], TEXTS[2:])
    ]
    (path / "c.jsonl.gz").write_bytes(b"".join(parts))
    return path / "c.jsonl.gz"


def write_zst(path: Path) -> Path:
    data = b"".join(json.dumps({"text": t}).encode() + b"\n" for t in TEXTS)
    with pa.output_stream(path / "c.jsonl.zst", compression="zstd") as file:
        file.write(data)
    return path / "c.jsonl.zst"


def write_json(path: Path) -> Path:
    (path / "c.json").write_text("\ufeff \n" + json.dumps([{"text": t} for t in TEXTS], indent=2), encoding="utf-8")
    return path / "c.json"


def write_json_as_lines(path: Path) -> Path:
    return lines(path / "c.json", *({"text": t} for t in TEXTS))


def write_parquet(path: Path) -> Path:
    pq.write_table(pa.table({"text": TEXTS, "url": ["u"] * 4}), path / "c.parquet", row_group_size=3)
    return path / "c.parquet"


def write_arrow_stream(path: Path) -> None:
    table = pa.table({"text": TEXTS, "n": [1, 2, 3, 4]})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        for start in (0, 3):
            stream.write_table(table.slice(start, 3))


def write_dataset(path: Path) -> Path:
    """As `datasets` saves one: Arrow stream files, and JSON files that describe them."""
    directory = path / "c"
    directory.mkdir()
    write_arrow_stream(directory / "c.arrow")
    state = {"_data_files": [{"filename": "c.arrow"}], "_fingerprint": "0", "_split": "train"}
    (directory / "state.json").write_text(json.dumps(state))
    (directory / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return directory


def write_dataset_dict(path: Path) -> Path:
    (path / "dict").mkdir()
    write_dataset(path).rename(path / "dict" / "train")
    (path / "dict" / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    return path / "dict"


def write_text_lines(path: Path) -> Path:
    (path / "c.txt").write_text("\n".join(t.replace("\n", "") for t in TEXTS), encoding="utf-8")
    return path / "c.txt"


@pytest.mark.parametrize(
    "make",
    [
        write_jsonl,
        write_gz,
        write_zst,
        write_json,
        write_json_as_lines,
        write_parquet,
        write_dataset,
        write_dataset_dict,
    ],
)
def test_every_format_gives_the_same_documents(make, tmp_path: Path):
    corpus = open_corpus(make(tmp_path))
    assert list(corpus) == [Document(f"c:{i}", text=t) for i, t in enumerate(TEXTS)]
    assert corpus.counts["documents"] == 4 and sum(corpus.counts.values()) == 4
    assert list(corpus) == list(corpus), "a second iteration starts anew"
    assert corpus.counts["documents"] == 4
    for start, stop, step in [(1, 3, None), (3, None, None), (0, 4, 2), (2, 100, 1)]:
        part = open_corpus(corpus.files[0].path, rows=slice(start, stop, step))
        assert list(part) == list(corpus)[start:stop:step]


@pytest.mark.parametrize(
    ("text_split", "expected"),
    [
        ("file", ["a b\nc\n\n\nd e  f\r\n\ng"]),
        ("lines", ["a b", "c", "d e  f", "g"]),
        ("paragraph", ["a b\nc", "d e  f", "g"]),
        ("words:2", ["a b\n", "c\n\n\nd ", "e  f\r\n", "g"]),
    ],
)
def test_text_files(text_split: str, expected: list[str], tmp_path: Path):
    (tmp_path / "t.txt").write_bytes(b"a b\nc\n\n\nd e  f\r\n\ng")
    found = texts(open_corpus(tmp_path / "t.txt", text_split=text_split))
    assert [t.replace("\r", "").split() for t in found] == [t.replace("\r", "").split() for t in expected]
    if text_split in ("file", "lines", "paragraph"):
        assert found == expected


@needs_data
def test_tinyshakespeare_words_are_all_there():
    path = DATA / "corpus" / "tinyshakespeare.txt"
    found = texts(open_corpus(path, text_split="words:300"))
    assert {len(t.split()) for t in found[:-1]} == {300}
    assert " ".join(found).split() == path.read_text().split()
    assert texts(open_corpus(path)) == [path.read_text()]


@needs_data
def test_c4_and_fastchat():
    path = DATA / "corpus" / "c4-train-00000-of-01637.parquet"
    assert texts(open_corpus(path)) == pq.read_table(path)["text"].to_pylist()
    chats = list(open_corpus(DATA / "chat" / "fastchat_dummy_conversation.json"))
    assert len(chats) == 500 and chats[0].doc_id == "identity_0"
    assert chats[0].messages and chats[0].messages[0] == {"role": "user", "content": "Who are you?"}
    assert {m["role"] for c in chats for m in c.messages or ()} == {"user", "assistant"}


def test_directories(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    lines(tmp_path / "sub" / "a.jsonl", {"text": "1"}, {"text": "2"})
    lines(tmp_path / "a.jsonl", {"text": "3"})
    (tmp_path / "a.txt").write_text("4")
    (tmp_path / "b.md").write_text("5")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "dataset_infos.json").write_text("{}")
    corpus = open_corpus(tmp_path)
    assert ids(corpus) == ["a.jsonl:0", "a.txt:0", "b:0", "sub/a:0", "sub/a:1"]
    assert texts(corpus) == ["3", "4", "5", "1", "2"]
    assert ids(open_corpus(tmp_path, rows=slice(2, 4))) == ["b:0", "sub/a:0"]


def test_splits_of_a_directory(tmp_path: Path):
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        pq.write_table(pa.table({"text": [name]}), tmp_path / "data" / f"{name}.parquet")
    assert texts(open_corpus(tmp_path, split="train")) == ["train-00000-of-00002", "train-00001-of-00002"]
    assert texts(open_corpus(tmp_path, split="test")) == ["test-00000-of-00001"]
    with pytest.raises(InputError, match="no files of split 'validation'"):
        open_corpus(tmp_path, split="validation")


def test_names_do_not_depend_on_what_is_skipped(tmp_path: Path):
    path = lines(
        tmp_path / "c.jsonl", {"text": "a"}, b"\n", b"{broken\n", {"text": " "}, {"text": "b", "id": 7}, {"text": "c"}
    )
    corpus = open_corpus(path)
    assert ids(corpus) == ["c:0", "7", "c:5"]
    assert ids(open_corpus(path, id_field="none")) == ["c:0", "c:4", "c:5"]
    assert ids(open_corpus(path, rows=slice(3, None))) == ["7", "c:5"]
    with pytest.raises(InputError, match="no documents.*no id in field 'key'"):
        list(open_corpus(path, id_field="key"))


# Chats


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT},
        {"conversation": CHAT, "text": "not this"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"messages": [{"role": "User", "content": [{"type": "text", "text": "h"}, "i"]}, CHAT[1]]},
    ],
)
def test_chats_become_messages(record: dict, tmp_path: Path):
    expected = Document("c:0", messages=tuple(CHAT))
    assert list(open_corpus(lines(tmp_path / "c.jsonl", record))) == [expected]
    if "messages" in record:
        pq.write_table(pa.table({"messages": [CHAT]}), tmp_path / "c.parquet")
        assert list(open_corpus(tmp_path / "c.parquet")) == [expected]


def test_chats_that_are_none(tmp_path: Path):
    bad = [
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": ["hi"]},
        {"messages": []},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"messages": [{"role": "user", "content": "a\0b"}]},
        {"messages": [{"role": "user", "content": "x" * (MAX_CHARS + 1)}]},
    ]
    corpus = open_corpus(lines(tmp_path / "c.jsonl", *bad, {"messages": CHAT}))
    assert ids(corpus) == ["c:7"]
    assert {k: v for k, v in corpus.counts.items() if v} == {
        "documents": 1,
        "malformed": 4,
        "empty": 1,
        "binary": 1,
        "too_long": 1,
    }
    assert corpus.problems[0] == "c.jsonl:1: message 0: expected a role such as user or assistant, got 'wizard'"


# Bad input


def test_nothing_bad_loses_the_good(tmp_path: Path):
    long = "word " * (MAX_CHARS // 5 + 1)
    path = lines(
        tmp_path / "c.jsonl",
        {"text": "good 1"},
        {"text": ""},
        {"text": " \n\t\u3000"},
        {"text": None},
        {"text": "a\0b"},
        {"text": "".join(map(chr, range(1, 32))) * 3},
        b'{"text": "\xff\xfe"}\n',
        b'{"text": "\\ud800"}\n',
        b"{\n",
        b'["text"]\n',
        {"body": "x"},
        {"text": 5},
        b"[" * 200_000 + b"\n",
        {"text": long},
        b'{"text": "' + b"x" * MAX_LINE + b'"}\n',
        {"text": "good 2"},
        b'{"text": "cut off',
    )
    corpus = open_corpus(path)
    assert texts(corpus) == ["good 1", long[:MAX_CHARS], "good 2"]
    assert {k: v for k, v in corpus.counts.items() if v} == {
        "documents": 3,
        "cut": 1,
        "empty": 3,
        "binary": 2,
        "not_utf8": 2,
        "malformed": 6,
        "too_long": 1,
    }
    assert corpus.problems[0] == "c.jsonl:2: no text"
    assert "c.jsonl:7: not UTF-8 (byte 10 of the line)" in corpus.problems
    assert any(p.startswith("c.jsonl:17: not JSON") for p in corpus.problems)
    assert all("\n" not in p for p in corpus.problems)


def test_bad_text_files(tmp_path: Path):
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "latin.txt").write_bytes("Grüße aus Köln".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "bom.txt").write_bytes("\ufeffgood".encode())
    corpus = open_corpus(tmp_path)
    assert list(corpus) == [Document("bom:0", text="good")]
    assert {k: v for k, v in corpus.counts.items() if v} == {"documents": 1, "binary": 1, "not_utf8": 1, "empty": 1}
    (tmp_path / "mixed.txt").write_bytes(b"good\n\xff\xfe\nalso good\n")
    mixed = open_corpus(tmp_path / "mixed.txt", text_split="lines")
    assert texts(mixed) == ["good", "also good"] and mixed.counts["not_utf8"] == 1


def test_a_huge_text_is_cut_at_a_character(tmp_path: Path):
    (tmp_path / "t.txt").write_text("日" * (MAX_CHARS + 5), encoding="utf-8")
    corpus = open_corpus(tmp_path / "t.txt")
    assert [len(t or "") for t in texts(corpus)] == [MAX_CHARS] and corpus.counts["cut"] == 1


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.jsonl.zst", "c.parquet", "c.json", "c.arrow"])
def test_damaged_files_keep_what_is_before(name: str, tmp_path: Path):
    rng = np.random.default_rng(0)
    many = ["".join(map(chr, rng.integers(97, 123, 300))) for _ in range(2000)]
    path = tmp_path / name
    if name.startswith("c.jsonl"):
        data = b"".join(json.dumps({"text": t}).encode() + b"\n" for t in many)
        if name.endswith("gz"):
            path.write_bytes(gzip.compress(data))
        else:
            with pa.output_stream(path, compression="zstd") as file:
                file.write(data)
    elif name == "c.json":
        path.write_text(json.dumps([{"text": t} for t in many]))
    elif name == "c.parquet":
        pq.write_table(pa.table({"text": many}), path, row_group_size=200, compression="none")
    else:
        table = pa.table({"text": many})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=200)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    lines(tmp_path / "z.jsonl", {"text": "beside"})
    corpus = open_corpus(tmp_path)
    found = texts(corpus)
    assert found[-1] == "beside" and found[:-1] == many[: len(found) - 1]
    assert corpus.counts["unreadable"] + corpus.counts["malformed"] == 1
    assert len(found) > 500 or name == "c.parquet"  # whose directory of contents is at the end


def test_parquet_that_is_not_utf8(tmp_path: Path):
    column = pa.array([b"good", b"\xff\xfe", b"also"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "c.parquet")
    corpus = open_corpus(tmp_path / "c.parquet")
    assert texts(corpus) == ["good", "also"] and corpus.counts["not_utf8"] == 1


def test_repeated_ids_are_an_error(tmp_path: Path):
    path = lines(tmp_path / "c.jsonl", {"id": "x", "text": "a"}, {"id": "y", "text": "b"}, {"id": "x", "text": "c"})
    with pytest.raises(InputError, match="c.jsonl:3: the document id 'x' comes a second time.*--id-field none"):
        list(open_corpus(path))
    assert ids(open_corpus(path, id_field="none")) == ["c:0", "c:1", "c:2"]


def test_many_ids_are_told_apart(tmp_path: Path):
    """More than are kept in the set of new ones."""
    n = (1 << 16) + 50
    path = lines(tmp_path / "c.jsonl", *({"id": i, "text": "a"} for i in range(n)), {"id": 3, "text": "b"})
    with pytest.raises(InputError, match=f"c.jsonl:{n + 1}: the document id '3'"):
        for _ in open_corpus(path):
            pass


def test_refusals(tmp_path: Path):
    path = lines(tmp_path / "c.jsonl", {"text": "a"})
    (tmp_path / "none").mkdir()
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "t.parquet")
    calls = [
        (lambda: open_corpus(tmp_path / "nothing"), "no such file"),
        (lambda: open_corpus(tmp_path / "none"), "no files to read"),
        (lambda: open_corpus(path, text_split="pages"), "file, paragraph, lines or words:N"),
        (lambda: open_corpus(path, text_split="words:0"), "words:N"),
        (lambda: open_corpus(path, text_field="a", messages_field="b"), "one of the two"),
        (lambda: open_corpus(path, rows=slice(-3, None)), "forward from the beginning"),
        (lambda: list(open_corpus(path, rows=slice(5, 9))), "no documents"),
        (lambda: list(open_corpus(path, text_field="body")), "no documents.*got the fields text|'body'"),
        (lambda: open_corpus(tmp_path / "t.parquet", text_field="text"), "no column 'text': expected body"),
        (lambda: list(open_corpus(tmp_path / "t.parquet")), "no documents.*got the fields body"),
        (lambda: open_corpus("hub:not a name"), "hub:org/name"),
    ]
    for call, message in calls:
        with pytest.raises(NLAError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    dataset = write_dataset(tmp_path)
    (dataset / "state.json").write_text(json.dumps({"_data_files": [], "_indices_data_files": [{"filename": "i"}]}))
    with pytest.raises(InputError, match="flatten_indices"):
        open_corpus(dataset)


def test_hub_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="hub:org/name cannot be downloaded") as caught:
        open_corpus("hub:org/name")
    assert "\n" not in str(caught.value)
    asked = {}

    def snapshot(name: str, **options) -> str:
        asked.update(options, name=name)
        return str(write_parquet(tmp_path).parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert texts(open_corpus("hub:org/name@v1")) == TEXTS
    assert (asked["name"], asked["revision"], asked["repo_type"]) == ("org/name", "v1", "dataset")
    assert all("parquet" in p or "jsonl" in p for p in asked["allow_patterns"])


def test_identity_tells_corpora_apart(tmp_path: Path):
    path = lines(tmp_path / "c.jsonl", {"text": "a"}, {"text": "b"})
    one = open_corpus(path).identity
    assert open_corpus(path).identity == one and str(tmp_path) not in json.dumps(one)
    assert open_corpus(path, rows=slice(0, 1)).identity != one
    lines(path, {"text": "a"}, {"text": "b"}, {"text": "c"})
    assert open_corpus(path).identity != one


MEMORY = """
import resource, sys
from nla_jax.corpus import open_corpus
n = sum(len(d.text) for d in open_corpus(sys.argv[1]))
print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.parametrize("name", ["c.jsonl", "c.json", "c.parquet", "c.arrow"])
def test_memory_is_flat(name: str, tmp_path: Path):
    """80 MB of text; what reading it takes beyond the libraries is far less."""
    rng = np.random.default_rng(0)
    text = ["".join(map(chr, rng.integers(97, 123, 2000))) for _ in range(100)]
    path = tmp_path / name
    if name == "c.jsonl":
        lines(path, *({"text": t} for t in text * 400))
    elif name == "c.json":
        path.write_text(json.dumps([{"text": t} for t in text * 400]))
    elif name == "c.parquet":
        writer = pq.ParquetWriter(path, pa.schema({"text": pa.string()}), compression="none", use_dictionary=False)
        for _ in range(400):
            writer.write_table(pa.table({"text": text}))
        writer.close()
    else:
        table = pa.table({"text": text})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            for _ in range(400):
                stream.write_table(table)

    def run(source: Path) -> tuple[int, int]:
        out = subprocess.run([sys.executable, "-c", MEMORY, str(source)], capture_output=True, text=True, check=True)
        n, peak = map(int, out.stdout.split())
        return n, peak

    small = lines(tmp_path / "small.jsonl", {"text": "a"})
    _, base = run(small)
    n, peak = run(path)
    assert n == 80_000_000
    # A file that is mapped into memory counts as far as it was touched, though the system may drop it at any time.
    assert peak - base < (120 if name == "c.arrow" else 40), f"{base} MiB for nothing, {peak} MiB for 80 MB"


# Tokens

SYSTEM = {"role": "system", "content": "Be <b>brief</b>."}
LITERAL = {"role": "user", "content": "  what is <|im_end|> and <s>[INST]? 日本 🙂\n"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_dir(write(tmp_path_factory.mktemp("tiny"), llama_like(), LLAMA_CONFIG))


def check_ends(found, text: str) -> None:
    data = text.encode()
    assert found.text == text
    assert (np.diff(found.text_end) >= 0).all() and found.text_end[-1] == len(data)
    for end in found.text_end:
        data[:end].decode()  # on a character boundary


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))
def test_plain_text_ends_on_characters(text: str, tiny: Tokenizer):
    found = tokenize_document(Document("d", text=text), tiny, 10_000)
    assert found.ids.tolist() == tiny.encode(text, add_special=True)
    check_ends(found, text)
    assert found.special.tolist() == [True] + [False] * (len(found.ids) - 1)
    assert found.roles.tolist() == [5] + [0] * (len(found.ids) - 1)
    # The text up to a token that ends with a character is what the tokens up to it decode to.
    for i in range(1, len(found.ids)):
        decoded = tiny.decode(found.ids[1 : i + 1].tolist())
        if "\ufffd" not in decoded:
            assert text.encode()[: found.text_end[i]].decode() == decoded


def test_special_strings_in_texts_are_plain(tiny: Tokenizer):
    text = "a log: <|im_start|>user <|end|> <|bos|>"
    found = tokenize_document(Document("d", text=text), tiny, 100)
    assert found.special.sum() == 1 and found.special[0]
    assert tiny.decode(found.ids[1:].tolist()) == text


def test_chats_keep_roles(tiny: Tokenizer):
    messages = ({"role": "user", "content": "user"}, {"role": "assistant", "content": "<|im_end|> is user\nfor 日 "})
    found = tokenize_document(Document("d", messages=messages), tiny, 1000)
    check_ends(
        found, "<|bos|><|im_start|>user\nuser<|im_end|>\n<|im_start|>assistant\n<|im_end|> is user\nfor 日 <|im_end|>\n"
    )
    assert found.ids.tolist() == tiny.encode_chat(messages)
    parts: dict[int, str] = {}
    last = 0
    for role, end in zip(found.roles, found.text_end, strict=True):
        parts[int(role)] = parts.get(int(role), "") + found.text.encode()[last:end].decode()
        last = end
    # The content's last space is outside of what is marked, and belongs to the token that holds it.
    assert parts[2] == "user" and parts[3].rstrip() == "<|im_end|> is user\nfor 日"
    assert parts[5].startswith("<|bos|><|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")
    assert found.special.sum() == 5


@pytest.mark.parametrize("name", ["qwen", "mistral", "mistral-sentencepiece", "gemma", "drops-thoughts"])
@needs_data
def test_roles_and_ids_of_real_templates(name: str, tmp_path: Path):
    if name == "qwen":
        directory = QWEN
    elif name == "mistral":
        directory = MISTRAL
    elif name == "mistral-sentencepiece":
        directory = tmp_path
        for file in ("tokenizer.model.v3", "tokenizer_config.json"):
            (tmp_path / file).write_bytes((MISTRAL / file).read_bytes())
    else:
        template = GEMMA_CHAT
        if name == "drops-thoughts":
            template = "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1].lstrip() }}{% endfor %}"
        directory = write(tmp_path, llama_like(), {**LLAMA_CONFIG, "chat_template": template})
    tokenizer = Tokenizer.from_dir(directory)
    answer = {"role": "assistant", "content": "<think>hm, user?</think>\n\nA special token: [/INST]</s>"}
    system = () if name.startswith("mistral") else (SYSTEM,)
    messages = (*system, LITERAL, answer, {"role": "user", "content": "user"})
    found = tokenize_document(Document("d", messages=messages), tokenizer, 1000)
    assert found.ids.tolist() == tokenizer.encode_chat(messages)
    assert found.text == tokenizer.render_chat(messages)
    check_ends(found, found.text)
    contents = {1: "Be <b>brief</b>.", 2: LITERAL["content"].strip() + "user", 3: answer["content"]}
    if name == "drops-thoughts":
        contents[3] = "A special token: [/INST]</s>"
    spoken = {role: "" for role in contents}
    last = 0
    for role, end in zip(found.roles, found.text_end, strict=True):
        if role in spoken:
            spoken[role] += found.text.encode()[last:end].decode()
        last = end
    for role, content in contents.items():
        if role == 1 and not system:
            continue
        # Tokens on the seam count for the side that their last character is on; no token has more than these.
        assert "".join(content.split()) == "".join(spoken[role].split()), role


def test_max_tokens_cuts_text_and_tokens(tiny: Tokenizer):
    text = "hello world 日本 " * 400
    whole = tokenize_document(Document("d", text=text), tiny, 10**6)
    for n in (1, 2, 17, 500):
        part = tokenize_document(Document("d", text=text), tiny, n)
        np.testing.assert_array_equal(part.ids, whole.ids[:n])
        np.testing.assert_array_equal(part.text_end, whole.text_end[:n])
        assert part.text.encode() == text.encode()[: part.text_end[-1]]


@needs_data
@pytest.mark.parametrize("directory", [QWEN, MISTRAL], ids=["qwen", "mistral"])
def test_the_beginning_of_a_book_has_the_tokens_of_the_book(directory: Path):
    tokenizer = Tokenizer.from_dir(directory)
    book = (DATA / "corpus" / "tinyshakespeare.txt").read_text()
    for start in (0, 1003, 50_021):
        text = book[start : start + 200_000]
        ids = tokenizer.encode(text, add_special=True)
        for n in (1, 64, 512):
            assert tokenize_document(Document("d", text=text), tokenizer, n).ids.tolist() == ids[:n]
    spaces = "a" + " " * 100_000 + "b"
    assert (
        tokenize_document(Document("d", text=spaces), tokenizer, 64).ids.tolist()
        == tokenizer.encode(spaces, add_special=True)[:64]
    )


def test_dates_in_templates_are_fixed(tmp_path: Path):
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer.from_dir(write(tmp_path, llama_like(), {**LLAMA_CONFIG, "chat_template": template}))
    found = tokenize_document(Document("d", messages=tuple(CHAT)), tokenizer, 100)
    assert found.text == "26 Jul 2024hihello"


def test_a_template_that_refuses(tmp_path: Path):
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer = Tokenizer.from_dir(write(tmp_path, llama_like(), {**LLAMA_CONFIG, "chat_template": template}))
    with pytest.raises(PromptError, match="roles must alternate"):
        tokenize_document(Document("d", messages=tuple(CHAT)), tokenizer, 100)
    corpus = open_corpus(lines(tmp_path / "c.jsonl", {"messages": CHAT}))
    list(corpus)
    corpus.skip("c:0", "refused", "roles must alternate")
    assert corpus.counts["refused"] == 1 and corpus.problems == ["c:0: roles must alternate"]
