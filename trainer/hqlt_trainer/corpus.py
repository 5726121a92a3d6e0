"""Text for byte-level language modelling: found, checked, hashed and split. Knows no torch.

A corpus is a list of documents: the Python files of the running interpreter's standard library (tests excluded), or
the .txt files, .jsonl rows and .parquet rows of a file or folder. It is split by document, so that no file is trained
on and tested on: documents are put in the order of a hash of their names, the first twentieth of the bytes becomes the
validation split, the next the test split, the rest is for training. A corpus of fewer than twenty documents is first
cut, at line ends, into passages of a fortieth of it.

The corpus is held in memory, as two bytes per byte of text.
"""

import gzip
import hashlib
import json
import lzma
import os
import re
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from hqlt_search_space.errors import DataError
from hqlt_search_space.tasks import LanguageModelling

STDLIB = "stdlib"
DOCUMENT_START = 256
"""The token before each document; the others are its bytes."""

Split = Literal["train", "validation", "test"]
Tokens = npt.NDArray[np.uint16]

HELD_OUT_FRACTION = 0.05  # of the bytes, for validation and for test each
MIN_DOCUMENTS = 20
PASSAGE_FRACTION = 1 / 40
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SUFFIXES = (".txt", ".jsonl", ".parquet")
MAX_UNPACKED_RATIO = 1000  # text compresses to a third or a tenth
MIN_UNPACKED_BYTES = 16 * 1024**2  # what the smallest file may unpack to
ROW_BYTES = 64  # what a row counts for even if it is empty: it costs time
_LINE = re.compile(rb"\S[^\n]*")  # from its first character; empty lines cost nothing


@dataclass(frozen=True)
class Corpus:
    """A corpus as read: its hash, and each split as tokens, every document after a `DOCUMENT_START`."""

    sha256: str
    n_documents: int
    splits: dict[Split, Tokens]


def fingerprint(task: LanguageModelling) -> str:
    """SHA-256 of the corpus of `task`: of its documents' names and bytes, in order.

    Raises:
        DataError: the corpus is missing, empty, unreadable, not UTF-8, or lacks the column.
    """
    return _read(task.corpus, task.column).sha256


def load_corpus(task: LanguageModelling) -> Corpus:
    """The corpus of `task`, read once per process.

    Raises:
        DataError: as `fingerprint`, or the corpus is not the one whose hash the task carries.
    """
    corpus = _read(task.corpus, task.column)
    if task.data_sha256 not in (None, corpus.sha256):
        raise DataError(
            f"the corpus {task.corpus!r} has changed: the trial was made with SHA-256 {task.data_sha256}, "
            f"what is there now has {corpus.sha256}"
            + (" (each Python version has a standard library of its own)" if task.corpus == STDLIB else "")
        )
    return corpus


def evaluation_tokens(task: LanguageModelling, split: Literal["validation", "test"]) -> Tokens:
    """The part of `split` that models are judged on: its first tokens, one more than is predicted."""
    n_tokens = task.n_validation_bytes if split == "validation" else task.n_test_bytes
    return load_corpus(task).splits[split][: n_tokens + 1]


@lru_cache(maxsize=4)
def compressor_bits_per_byte(task: LanguageModelling) -> dict[str, float]:
    """What gzip -9 and xz need for the evaluated validation bytes, as bits per byte.

    They see these bytes alone, without the training text: a modest anchor, and the first thing a model should beat.
    """
    tokens = evaluation_tokens(task, "validation")
    text = tokens[tokens != DOCUMENT_START].astype(np.uint8).tobytes()
    return {
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9, mtime=0)) / len(text),
        "xz_bits_per_byte": 8 * len(lzma.compress(text)) / len(text),
    }


@lru_cache(maxsize=2)
def _read(corpus: str, column: str) -> Corpus:
    documents = [(name, text) for name, text in _documents(corpus, column) if text]
    if not documents:
        raise DataError(f"the corpus {corpus!r} is empty: there is no text in it")
    digest = hashlib.sha256()
    for name, text in documents:
        digest.update(f"{name}\0{len(text)}\0".encode())
        digest.update(text)
    return Corpus(digest.hexdigest(), len(documents), _split(corpus, documents))


def _split(corpus: str, documents: list[tuple[str, bytes]]) -> dict[Split, Tokens]:
    total = sum(len(text) for _, text in documents)
    if len(documents) < MIN_DOCUMENTS:
        documents = [passage for name, text in documents for passage in _passages(name, text, total)]
    documents.sort(key=lambda document: hashlib.sha256(document[0].encode()).digest())
    parts: dict[Split, list[bytes]] = {"validation": [], "test": [], "train": []}
    for split in ("validation", "test"):
        held_out = 0
        while documents and held_out < HELD_OUT_FRACTION * total:
            parts[split].append(documents.pop(0)[1])
            held_out += len(parts[split][-1])
    parts["train"] = [text for _, text in documents]
    for split, texts in parts.items():
        if not texts:
            raise DataError(
                f"the corpus {corpus!r} is too small to split: {total} bytes leave nothing for the {split} split; "
                f"give a text of at least {MIN_DOCUMENTS} lines or documents"
            )
    return {split: _tokens(texts) for split, texts in parts.items()}


def _passages(name: str, text: bytes, total: int) -> Iterator[tuple[str, bytes]]:
    passage_bytes = max(1, int(total * PASSAGE_FRACTION))
    start = 0
    while start < len(text):
        line_end = text.find(b"\n", start + passage_bytes - 1)
        end = len(text) if line_end < 0 else line_end + 1
        yield f"{name}#{start}", text[start:end]
        start = end


def _tokens(texts: list[bytes]) -> Tokens:
    tokens = np.empty(sum(len(text) + 1 for text in texts), np.uint16)
    position = 0
    for text in texts:
        tokens[position] = DOCUMENT_START
        tokens[position + 1 : position + 1 + len(text)] = np.frombuffer(text, np.uint8)
        position += 1 + len(text)
    return tokens


def _documents(corpus: str, column: str) -> Iterator[tuple[str, bytes]]:
    """Name and text of each document, in the order of their names; a name never has an absolute path in it."""
    if corpus == STDLIB:
        yield from _stdlib_documents()
        return
    path = Path(corpus).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"the corpus folder {corpus!r} has no {', '.join(SUFFIXES)} file in it")
        for file in files:
            yield from _file_documents(file, file.relative_to(path).as_posix(), column)
    elif path.suffix not in SUFFIXES:
        raise DataError(f"the corpus is 'stdlib', a folder, or a {', '.join(SUFFIXES)} file; got {corpus!r}")
    else:
        yield from _file_documents(path, path.name, column)


def _stdlib_documents() -> Iterator[tuple[str, bytes]]:
    folder = Path(sysconfig.get_path("stdlib"))
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in NOT_STDLIB]
        files += [Path(parent, name) for name in names if name.endswith(".py")]
    if not files:
        raise DataError(f"this Python has no source files in {str(folder)!r}; give `corpus` a path to a text instead")
    for name, file in sorted((file.relative_to(folder).as_posix(), file) for file in files):
        yield name, _bytes(file)


def _file_documents(file: Path, name: str, column: str) -> Iterator[tuple[str, bytes]]:
    match file.suffix:
        case ".txt":
            text = _bytes(file)
            _decode(text, str(file))
            yield name, text
        case ".jsonl":
            content = _bytes(file)
            number, counted = 1, 0
            for found in _LINE.finditer(content):
                number += content.count(b"\n", counted, found.start())
                counted = found.start()
                yield f"{name}:{number}", _json_text(found[0], f"{file}, line {number}", column)
        case ".parquet":
            yield from _parquet_documents(file, name, column)


def _bytes(file: Path) -> bytes:
    _check_is_regular(file)
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {str(file)!r}: {error.strerror}") from error


def _check_is_regular(file: Path) -> None:
    """Opening a pipe would wait for somebody to write into it, and some devices have no end."""
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError):  # the reader says what is wrong
        return
    if not stat.S_ISREG(mode):
        raise DataError(f"cannot read {str(file)!r}: it is no regular file but a pipe, a socket or a device")


def _decode(text: bytes, where: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8: byte {error.start} is 0x{text[error.start]:02x}") from error


def _json_text(line: bytes, where: str, column: str) -> bytes:
    try:
        row = json.loads(_decode(line, where))
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:  # a number of more than 4300 digits
        raise DataError(f"{where} is not JSON that can be read: {error}") from error
    except RecursionError as error:
        raise DataError(f"{where} is not a flat JSON object: it is nested too deeply") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is not a JSON object with a key {column!r}")
    if column not in row:
        raise DataError(f"{where} has no key {column!r}; it has {_some_of(row)}")
    return _text(row[column], where, column)


def _text(value: object, where: str, column: str) -> bytes:
    if not isinstance(value, str):
        raise DataError(f"{where}: {column!r} is not text but {type(value).__name__}")
    try:
        return value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise DataError(f"{where} cannot be written as UTF-8: half a surrogate pair at {error.start}") from error


def _parquet_documents(file: Path, name: str, column: str) -> Iterator[tuple[str, bytes]]:
    # Imported here: half of the corpora are not Parquet, and this import takes as long as reading the standard library.
    import pyarrow as pa
    import pyarrow.parquet as pq

    _check_is_regular(file)
    try:
        with pq.ParquetFile(file) as parquet:
            _check_column(parquet.schema_arrow, str(file), column)
            metadata = parquet.metadata
            most = max(MIN_UNPACKED_BYTES, MAX_UNPACKED_RATIO * file.stat().st_size)
            groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
            if sum(group.total_byte_size for group in groups) > most:
                raise DataError(_too_much(file))
        # As a dictionary, a text that a small file repeats a million times is in memory once.
        with pq.ParquetFile(file, read_dictionary=[column]) as parquet:
            number = n_bytes = 0
            for rows in parquet.iter_batches(columns=[column]):
                values = rows.column(0)
                texts = [bytes(value.as_buffer() or b"") for value in values.dictionary]
                for index in values.indices.to_pylist():
                    number += 1
                    n_bytes += ROW_BYTES
                    if index is not None:
                        # Parquet checks neither its indices nor its strings; both are taken as they are.
                        if not 0 <= index < len(texts):
                            raise DataError(f"cannot read {str(file)!r} as Parquet: row {number} is damaged")
                        n_bytes += len(texts[index])
                        _decode(texts[index], f"{file}, row {number}")
                        yield f"{name}:{number}", texts[index]
                    if n_bytes > most:
                        raise DataError(_too_much(file))
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a name that is no UTF-8
        raise DataError(f"cannot read {str(file)!r} as Parquet: {error}") from error


def _check_column(schema: Any, where: str, column: str) -> None:
    import pyarrow as pa

    if column not in schema.names:
        raise DataError(f"{where!r} has no column {column!r}; it has {_some_of(schema.names)}")
    field = schema.field(column)
    # An extension type is decoded by whatever code the process has registered for it; text needs none.
    extension = isinstance(field.type, pa.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {})
    if extension or not (pa.types.is_string(field.type) or pa.types.is_large_string(field.type)):
        kind = f"extension type {field.type}" if extension else str(field.type)
        raise DataError(f"{where!r}: column {column!r} is not text but {kind}")


def _too_much(file: Path) -> str:
    return f"{str(file)!r} unpacks to more than {MAX_UNPACKED_RATIO} times its size: no text does"


def _some_of(names: object) -> str:
    known = sorted(str(name) for name in names)  # type: ignore[attr-defined]  # a dict or a list of names
    return ", ".join(known[:10]) + (f" and {len(known) - 10} more" if len(known) > 10 else "") or "none"
