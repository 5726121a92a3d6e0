"""The corpus: what is read, how it is split, and every way in which it cannot be used."""

import contextlib
import io
import json
import os
import pickle
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hqlt_search_space.errors import DataError
from hqlt_search_space.tasks import LanguageModelling
from hqlt_trainer import corpus
from hqlt_trainer.corpus import DOCUMENT_START, compressor_bits_per_byte, evaluation_tokens, fingerprint, load_corpus
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(autouse=True)
def _forget_what_was_read() -> None:
    corpus._read.cache_clear()
    compressor_bits_per_byte.cache_clear()


def documents(tokens: np.ndarray) -> list[bytes]:
    """The texts in a stream of tokens."""
    starts = [*np.flatnonzero(tokens == DOCUMENT_START), len(tokens)]
    assert starts[0] == 0
    return [bytes(tokens[start + 1 : end].astype(np.uint8).tolist()) for start, end in pairwise(starts)]


def all_documents(path: Path, column: str = "text") -> list[bytes]:
    splits = load_corpus(LanguageModelling(corpus=str(path), column=column)).splits
    return [text for tokens in splits.values() for text in documents(tokens)]


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, columns: dict[str, pa.Array]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_the_standard_library_is_split_by_file_in_nine_tenths_and_two_twentieths() -> None:
    splits = load_corpus(LanguageModelling()).splits
    sizes = {split: len(tokens) for split, tokens in splits.items()}
    total = sum(sizes.values())
    assert total > 5e6
    assert sizes["validation"] / total == pytest.approx(0.05, abs=0.03)
    assert sizes["test"] / total == pytest.approx(0.05, abs=0.03)
    assert Path(json.__file__).read_bytes() in [text for tokens in splits.values() for text in documents(tokens)]


def test_no_file_of_the_standard_library_is_a_test_or_was_installed() -> None:
    names = [name for name, _ in corpus._stdlib_documents()]
    assert names == sorted(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/")[:-1])]


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.text("ab\n é", min_size=1, max_size=40), min_size=20, max_size=60))
def test_every_document_is_in_exactly_one_split(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write_jsonl(tmp_path_factory.mktemp("corpus") / "c.jsonl", [{"text": text} for text in texts])
    assert sorted(all_documents(path)) == sorted(text.encode() for text in texts)


def test_a_single_text_is_cut_at_line_ends_and_nothing_of_it_is_lost(tmp_path: Path) -> None:
    lines = [f"line {i} of a text that is one document\n" for i in range(1000)]
    path = tmp_path / "book.txt"
    path.write_text("".join(lines))
    passages = all_documents(path)
    assert all(passage.endswith(b"\n") for passage in passages)
    assert sorted(line for passage in passages for line in passage.decode().splitlines(True)) == sorted(lines)


def test_all_formats_of_a_folder_are_read(tmp_path: Path) -> None:
    texts = [f"{kind} {i}\n" for kind in ("txt", "jsonl", "parquet") for i in range(10)]
    for i, text in enumerate(texts[:10]):
        (tmp_path / f"{i}.txt").write_text(text)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write_jsonl(tmp_path / "deep" / "er" / "rows.jsonl", [{"text": text} for text in texts[10:20]])
    write_parquet(tmp_path / "rows.parquet", {"text": pa.array([*texts[20:], None]), "n": pa.array(range(11))})
    (tmp_path / "notes.md").write_text("not read")
    assert sorted(all_documents(tmp_path)) == sorted(text.encode() for text in texts)


def test_another_column_can_be_named(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "c.parquet", {"content": pa.array([f"{i}\n" for i in range(30)], pa.large_string())}
    )
    assert len(all_documents(path, column="content")) == 30


def test_the_fingerprint_follows_names_and_contents_but_not_the_place(tmp_path: Path) -> None:
    def written(folder: str, name: str, text: str) -> str:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text * 50)
        return fingerprint(LanguageModelling(corpus=str(tmp_path / folder)))

    first = written("a", "x.txt", "one\n")
    assert written("b", "x.txt", "one\n") == first
    assert len({first, written("c", "x.txt", "two\n"), written("d", "y.txt", "one\n")}) == 3


def test_a_corpus_that_changed_after_the_trial_was_made_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("a line\n" * 100)
    task = LanguageModelling(corpus=str(path), data_sha256=fingerprint(LanguageModelling(corpus=str(path))))
    load_corpus(task)
    corpus._read.cache_clear()
    path.write_text("another line\n" * 100)
    with pytest.raises(DataError, match="has changed: the trial was made with SHA-256"):
        load_corpus(task)


def test_compressors_are_judged_on_the_bytes_that_models_are_judged_on(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_bytes(bytes(np.random.default_rng(0).integers(97, 101, 200_000).astype(np.uint8)).replace(b"a", b"\n"))
    task = LanguageModelling(corpus=str(path), n_validation_bytes=5000)
    assert len(evaluation_tokens(task, "validation")) == 5001
    scores = compressor_bits_per_byte(task)
    assert 2.0 < scores["gzip_bits_per_byte"] < 2.8  # four equally likely bytes hold 2 bits each
    assert 2.0 < scores["xz_bits_per_byte"] < 2.8


def _parquet() -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array([f"line {i}\n" for i in range(50)]), "n": pa.array(range(50))}), content)
    return content.getvalue()


PARQUET = _parquet()


def not_utf8(path: Path) -> Path:
    path.write_bytes(b"fine so far \xff and on")
    return path


def bad_jsonl(path: Path, line: str) -> Path:
    path.write_text('{"text": "fine"}\n' + line)
    return path


def truncated(path: Path) -> Path:
    write_parquet(path, {"text": pa.array(["text"] * 1000)})
    path.write_bytes(path.read_bytes()[:-20])
    return path


def parquet_with_bad_bytes(path: Path) -> Path:
    valid = pa.array([b"fine", b"\xff\xfe"], pa.binary())
    return write_parquet(path, {"text": pa.Array.from_buffers(pa.string(), 2, valid.buffers())})


def extension_type(path: Path) -> Path:
    return write_parquet(
        path, {"text": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16], pa.binary(16)))}
    )


def unregistered_extension_type(path: Path) -> Path:
    field = pa.field("text", pa.string(), metadata={"ARROW:extension:name": "somebody.pickle"})
    pq.write_table(pa.table([pa.array(["text"])], schema=pa.schema([field])), path)
    return path


def empty(path: Path) -> Path:
    path.touch()
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def linked(path: Path, to: str) -> Path:
    path.symlink_to(to)
    return path


def repeated(path: Path, text: str, times: int) -> Path:
    """A file of a few kilobytes that holds `text` `times` times."""
    indices = pa.array(np.zeros(times, np.int32))
    table = pa.table({"text": pa.DictionaryArray.from_arrays(indices, pa.array([text]))})
    pq.write_table(table, path, compression="zstd", store_schema=False)
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


UNUSABLE = {
    "missing": (lambda d: d / "c.txt", r"cannot read '.*c.txt': No such file or directory"),
    "missing parquet": (lambda d: d / "c.parquet", r"cannot read '.*c.parquet' as Parquet: .*No such file"),
    "another kind of file": (lambda d: d / "c.pdf", r"is 'stdlib', a folder, or a .txt, .jsonl, .parquet file; got"),
    "empty file": (lambda d: empty(d / "c.txt"), "is empty: there is no text in it"),
    "folder without text": (lambda d: folder(d / "c"), "has no .txt, .jsonl, .parquet file in it"),
    "a folder called .txt": (lambda d: folder(d / "c.txt"), "has no .txt, .jsonl, .parquet file in it"),
    "not UTF-8": (lambda d: not_utf8(d / "c.txt"), r"c.txt is not UTF-8: byte 12 is 0xff"),
    "row not UTF-8": (lambda d: not_utf8(d / "c.jsonl"), r"c.jsonl, line 1 is not UTF-8: byte 12 is 0xff"),
    "not JSON": (lambda d: bad_jsonl(d / "c.jsonl", '{"text": '), r"c.jsonl, line 2 is not JSON"),
    "deep JSON": (lambda d: bad_jsonl(d / "c.jsonl", "[" * 200_000), r"c.jsonl, line 2 is not "),
    "not an object": (lambda d: bad_jsonl(d / "c.jsonl", "[1]"), r"line 2 is not a JSON object with a key 'text'"),
    "no such key": (
        lambda d: bad_jsonl(d / "c.jsonl", '{"txt": "", "n": 1}'),
        "no key 'text'; it has n, txt",
    ),
    "key is no text": (lambda d: bad_jsonl(d / "c.jsonl", '{"text": 1}'), r"line 2: 'text' is not text but int"),
    "half a character": (
        lambda d: bad_jsonl(d / "c.jsonl", r'{"text": "\ud800"}'),
        "line 2 cannot be written",
    ),
    "no such column": (
        lambda d: write_parquet(d / "c.parquet", {"txt": pa.array([""]), "n": pa.array([1])}),
        r"has no column 'text'; it has n, txt",
    ),
    "column of numbers": (lambda d: write_parquet(d / "c.parquet", {"text": pa.array([1])}), "is not text but int64"),
    "truncated parquet": (lambda d: truncated(d / "c.parquet"), "cannot read '.*c.parquet' as Parquet"),
    "parquet of bad bytes": (lambda d: parquet_with_bad_bytes(d / "c.parquet"), r"row 2 is not UTF-8: byte 0 is 0xff"),
    "extension type": (lambda d: extension_type(d / "c.parquet"), "is not text but extension type"),
    "unknown extension type": (
        lambda d: unregistered_extension_type(d / "c.parquet"),
        "is not text but extension type",
    ),
    "pipe": (lambda d: pipe(d / "c.txt"), "it is no regular file but a pipe, a socket or a device"),
    "parquet pipe": (lambda d: pipe(d / "c.parquet"), "it is no regular file but a pipe, a socket or a device"),
    "endless device": (lambda d: linked(d / "c.jsonl", "/dev/zero"), "it is no regular file but a pipe, a socket"),
    "link to itself": (lambda d: linked(d / "c.txt", "c.txt"), "cannot read '.*c.txt': Too many levels of symbolic"),
    "folder of links to itself": (lambda d: linked(folder(d / "c") / "x", "."), "has no .txt, .jsonl, .parquet file"),
    "terabyte in 3 kB": (lambda d: repeated(d / "c.parquet", "x" * 10**6, 10**6), "unpacks to more than 1000 times"),
    "50 MB in 2 kB": (
        lambda d: repeated(d / "c.parquet", "x" * 5 * 10**7, 1),
        "unpacks to more than 1000 times",
    ),
    "millions of empty rows": (lambda d: repeated(d / "c.parquet", "", 10**7), "unpacks to more than 1000 times"),
    "millions of empty lines": (
        lambda d: written(d / "c.jsonl", b"\n" * 2 * 10**7),
        "is empty: there is no text in it",
    ),
    "one line of blanks": (lambda d: written(d / "c.jsonl", b" " * 2 * 10**7), "is empty: there is no text in it"),
    "endless line": (
        lambda d: written(d / "c.jsonl", b'{"text": "' + b"x" * 10**8),
        "line 1 is not JSON: Unterminated",
    ),
    "number of a million digits": (
        lambda d: written(d / "c.jsonl", b'{"text": ' + b"9" * 10**6),
        "line 1 is not JSON that can be read: Exceeds the limit",
    ),
    "a program": (lambda d: written(d / "c.txt", Path("/bin/sh").read_bytes()), "c.txt is not UTF-8"),
    "a program as rows": (lambda d: written(d / "c.jsonl", Path("/bin/sh").read_bytes()), "line 1 is not "),
    "a pickle as parquet": (lambda d: written(d / "c.parquet", pickle.dumps(print)), "cannot read '.*' as Parquet"),
    "one line": (
        lambda d: write_jsonl(d / "c.jsonl", [{"text": "one line"}]),
        "too small to split: 8 bytes",
    ),
}


@pytest.mark.parametrize(("make", "sentence"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_an_unusable_corpus_gets_a_sentence(make: object, sentence: str, tmp_path: Path) -> None:
    path: Path = make(tmp_path)  # type: ignore[operator]
    began = time.process_time()
    with pytest.raises(DataError, match=sentence):
        fingerprint(LanguageModelling(corpus=str(path)))
    gigabytes = path.stat().st_size / 1e9 if path.exists() and path.is_file() else 0
    assert time.process_time() - began < 1 + 5 * gigabytes


@settings(max_examples=300, deadline=None)
@given(
    places=st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 255)), min_size=1, max_size=5),
    cut=st.none() | st.integers(0, 10**9),
)
def test_a_damaged_parquet_file_is_read_or_gets_a_sentence(
    places: list[tuple[int, int]], cut: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    corpus._read.cache_clear()
    content = bytearray(PARQUET)
    for place, value in places:
        content[place % len(content)] = value
    path = tmp_path_factory.mktemp("damaged") / "c.parquet"
    path.write_bytes(content if cut is None else content[: cut % len(content)])
    with contextlib.suppress(DataError):
        fingerprint(LanguageModelling(corpus=str(path)))
