"""Prepared sets on disk, so that a set is prepared once: by one process of a run, and by the first of several runs.
Called by the trainers.

An entry is one Arrow file, named by a hash of all that its content depends on: the rows themselves, the tokenizer's
own state, the options, and the code that prepares. What a run is for (learning rate, folders, who else is in the
process) is not part of it. Processes wait for each other by a lock on a file, which the system takes from one that
dies, and never by a collective.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import os
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import pyarrow as pa
from datasets import Dataset
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tether.compat.datasets import arrow_table
from tether.compat.tokenizers import description
from tether.data.images.inputs import reads_images
from tether.data.prepare.prepare import Digests, Prepared, prepare
from tether.data.prepare.report import DIGEST_BYTES, Report
from tether.data.prepare.table import fingerprint_of
from tether.data.rows.columns import BATCH_ROWS, IMAGE_COLUMNS
from tether.data.sources.load import Source, load_rows
from tether.data.text.template import text_tokenizer
from tether.errors import ConfigError
from tether.types import Kind

logger = logging.getLogger("tether")
_DIGESTS = ("row_digest", "prompt_digest")
_NOTE = b"tether"
# Their releases may change what a tokenizer or a template writes.
_LIBRARIES = ("transformers", "tokenizers", "jinja2")
# Environment variable with the size that entries may have together, in GiB, and what it is where it is not set.
LIMIT, DEFAULT_LIMIT = "TETHER_CACHE_GIB", 50.0
# An entry that was used since is kept whatever its size: a run on another machine of a shared folder may have it open.
_KEPT_SECONDS = 7 * 24 * 3600
_NOT_HELD = (OSError, pa.ArrowException, ValueError, LookupError, TypeError, AttributeError)


def prepare_cached(
    rows: Source,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    folder: Path | None,
    name: str = "train",
    num_proc: int | None = None,
    **options: Any,
) -> Prepared:
    """`prepare`, unless its result lies in a folder.

    Args:
        rows: see `prepare`.
        tokenizer: see `prepare`.
        folder: where results are kept; None prepares and keeps nothing.
        name: what to call the rows; no part of what an entry is found by.
        num_proc: see `prepare`; the same.
        options: the others of `prepare`.

    Returns:
        What `prepare` returns. Where several processes ask for the same at once, one prepares and the others wait.

    Raises:
        DataError: see `prepare`.
        ConfigError: see `prepare`.
    """
    data = load_rows(rows, kind=cast(Kind, options.get("kind", "pair")), name=name)
    fresh = partial(prepare, data, tokenizer, name=name, num_proc=num_proc, **options)
    if folder is None:
        return fresh()
    if reads_images(tokenizer) and set(IMAGE_COLUMNS) & set(data.column_names):
        logger.info(f"{name}: not cached, since images are read from where they are, which may change")
        return fresh()
    key = cache_key(data, tokenizer, options)
    if key is None:
        logger.info(f"{name}: not cached, since the tokenizer ({type(tokenizer).__name__}) is not one of transformers'")
        return fresh()
    path = folder / f"{key}.arrow"
    found = _read(path, name)
    if found is not None:
        return found
    with ExitStack() as held:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _hold(path, name, held)
        except (OSError, NotImplementedError) as error:
            logger.warning(f"{name}: prepared rows are not cached in {folder} ({error})")
            return fresh()
        found = _read(path, name)
        if found is None:
            found = fresh()
            try:
                _write(found, path)
                remove_oldest(folder)
            except OSError as error:
                logger.warning(f"{name}: prepared rows are not cached in {folder} ({error})")
    return found


def remove_oldest(folder: Path, *, limit: float | None = None) -> list[Path]:
    """Remove the entries that were not used for longest, until the others fit the limit.

    A reader that has an entry open keeps it: on one machine the system keeps a removed file for whoever has it open,
    and what was used within a week is never removed. A reader that comes too late finds no entry, and prepares.

    Args:
        folder: of the entries.
        limit: GiB of all entries together; None: `TETHER_CACHE_GIB`, or 50.

    Returns:
        What was removed.

    Raises:
        ConfigError: the environment variable is not a number.
    """
    limit = _limit() if limit is None else limit
    entries = []
    for path in folder.glob("*.arrow"):
        with suppress(OSError):  # another process removed it
            state = path.stat()
            entries.append((state.st_mtime, state.st_size, path))
    size, removed = sum(entry[1] for entry in entries), []
    oldest = time.time() - _KEPT_SECONDS
    for used, own, path in sorted(entries):
        if size <= limit * 2**30 or used > oldest:
            break
        with suppress(OSError):  # gone already, or open where an open file cannot be removed
            path.unlink()
            removed.append(path)
        size -= own
    if removed:
        logger.info(
            f"cache: removed {len(removed)} prepared sets that were not used for a week or more, as {folder} "
            f"holds more than {limit:g} GiB ({LIMIT})"
        )
    return removed


def _limit() -> float:
    said = os.environ.get(LIMIT, "")
    try:
        limit = float(said or DEFAULT_LIMIT)
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise ConfigError(f"{LIMIT} is {said!r}; it must be a number of GiB, such as 50.")
    return limit


def cache_key(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, options: Mapping[str, Any]
) -> str | None:
    """What an entry is found by; equal for equal content on every process, machine and day.

    Args:
        rows: as `load_rows` returns them.
        tokenizer: see `prepare`.
        options: of `prepare`, those that decide what becomes of a row.

    Returns:
        32 hexadecimal digits, or None where what the tokenizer does cannot be told from its state.
    """
    state = tokenizer_state(tokenizer)
    if state is None:
        return None
    every = cast(dict[str, Any], prepare.__kwdefaults__)
    defaults = {option: value for option, value in every.items() if option not in ("name", "num_proc")}
    parts = {
        "code": _code(),
        "libraries": {library: importlib.metadata.version(library) for library in _LIBRARIES},
        "tokenizer": state,
        "options": {**defaults, **options},
        "rows": rows_digest(rows),
    }
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def rows_digest(rows: Dataset) -> str:
    """A content hash of all columns of some rows, in their order, however they are stored."""
    whole = blake2b(digest_size=16)
    stored = rows.with_format("arrow")
    for start in range(0, len(rows), BATCH_ROWS):
        table = cast(pa.Table, stored[start : start + BATCH_ROWS]).combine_chunks().replace_schema_metadata(None)
        written = pa.BufferOutputStream()
        with pa.ipc.new_stream(written, table.schema) as stream:
            stream.write_table(table)
        whole.update(written.getvalue())
    return whole.hexdigest()


def tokenizer_state(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> dict[str, Any] | None:
    """All that decides what a tokenizer and its template write, as JSON; None where code of others does, too."""
    tokenizer = text_tokenizer(processing_class)
    for one in (processing_class, tokenizer):
        replaced = any(callable(value) and hasattr(type(one), name) for name, value in vars(one).items())
        if replaced or not type(one).__module__.startswith("transformers."):
            return None
    templates = [getattr(one, "chat_template", None) for one in (tokenizer, processing_class)]
    state = {
        "class": [type(one).__name__ for one in (tokenizer, processing_class)],
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "all_special": [str(token) for token in tokenizer.all_special_tokens],
        "split_special": bool(getattr(tokenizer, "split_special_tokens", False)),
        "templates": templates,
        # A template may write the day on which it is rendered.
        "day": datetime.date.today().isoformat() if "strftime_now" in json.dumps(templates) else None,
        "image": getattr(processing_class, "image_token_id", None),
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {**state, "files": _saved(tokenizer)}
    model = description(backend)
    # What the last call asked for stays in these two; `prepare` asks for neither.
    model = {name: value for name, value in model.items() if name not in ("truncation", "padding")}
    return {**state, "model": model, "as_text": bool(backend.encode_special_tokens)}


def _saved(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Hashes of the files that hold a tokenizer without a serialisable backend."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): blake2b(path.read_bytes()).hexdigest() for path in files}


@lru_cache(maxsize=1)
def _code() -> str:
    """A hash of the code that prepares: a changed line of it makes new entries, and none is forgotten."""
    own = Path(__file__).parent.parent
    whole = blake2b(digest_size=16)
    for path in sorted([*own.rglob("*.py"), own.parent / "types.py"]):
        whole.update(path.name.encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()


def _hold(path: Path, name: str, held: ExitStack) -> None:
    """Be the only process that makes this entry, until `held` is left."""
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        logger.info(f"{name}: waiting for the process that prepares the same rows")
        lock.acquire()
    held.callback(lock.release)


def _write(prepared: Prepared, path: Path) -> None:
    """Write an entry as a whole or not at all."""
    for left in path.parent.glob(f"{path.stem}.*.tmp"):  # of a process that died; this one holds the lock
        left.unlink(missing_ok=True)
    table = arrow_table(prepared.dataset)
    for column, values in zip(_DIGESTS, (prepared.row_digests, prepared.prompt_digests), strict=True):
        buffers = [None, pa.py_buffer(values.joined)]
        table = table.append_column(column, pa.Array.from_buffers(pa.binary(DIGEST_BYTES), len(values), buffers))
    note = json.dumps({"report": prepared.report.to_dict(), "digests": _sum(prepared)})
    table = table.replace_schema_metadata({_NOTE: note.encode()})
    temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):  # who waits for the lock finds the entry; where an open file cannot go, it stays
        path.with_suffix(".lock").unlink()


def _read(path: Path, name: str) -> Prepared | None:
    """An entry; None where there is none, or none that is whole."""
    if not path.is_file():
        return None
    try:
        prepared = _restored(path, name)
    except _NOT_HELD as error:
        logger.warning(f"{name}: prepared again, as the entry {path} of the cache is damaged ({error})")
        return None
    with suppress(OSError):  # when it was last used; a folder of others cannot be written to
        os.utime(path)
    logger.info(f"{name}: {len(prepared.dataset):,} prepared rows from the cache")
    return prepared


def _restored(path: Path, name: str) -> Prepared:
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    note = json.loads(table.schema.metadata[_NOTE])
    seen = [Digests(b"".join(map(_bytes_of, table[column].chunks))) for column in _DIGESTS]
    rows = table.drop_columns(list(_DIGESTS)).replace_schema_metadata(None)
    said: dict[str, Any] = note["report"]
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}
    report = replace(Report(**values), name=name)
    prepared = Prepared(Dataset(rows, fingerprint=report.fingerprint), report, *seen)
    if fingerprint_of(rows) != report.fingerprint or _sum(prepared) != note["digests"]:
        raise ValueError("its content is not what was written")
    return prepared


def _bytes_of(digests: Any) -> bytes:
    if digests.null_count or digests.type != pa.binary(DIGEST_BYTES):
        raise ValueError("its digests are not what was written")
    start = digests.offset * DIGEST_BYTES
    return digests.buffers()[1][start : start + len(digests) * DIGEST_BYTES].to_pybytes()


def _sum(prepared: Prepared) -> str:
    whole = blake2b(prepared.row_digests.joined, digest_size=16)
    whole.update(prepared.prompt_digests.joined)
    return whole.hexdigest()
