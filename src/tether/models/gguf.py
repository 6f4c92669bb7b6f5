"""GGUF files: converted once to a cached folder of safetensors, which every later run loads in half a second."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import struct
import time
import uuid
from hashlib import blake2b
from pathlib import Path

import torch
from platformdirs import user_cache_path
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from tether.errors import ConfigError
from tether.progress import working

logger = logging.getLogger(__name__)

# Part of the folder's name: raise it when the conversion changes, so that no old result is read.
CONVERSION = 1
STALE_AFTER = 3600.0
MAGIC = b"GGUF"
# A cut file ends anywhere, so that reading it fails in any of these ways.
_READING_ERRORS = (OSError, ValueError, LookupError, ImportError, NotImplementedError, struct.error)


def cache_root() -> Path:
    """Folder for what Tether derives once and reads again.

    Returns:
        `$TETHER_CACHE`, else `tether` in the system's folder for caches: on Linux `$XDG_CACHE_HOME`, else `~/.cache`.
        It may not exist yet.
    """
    chosen = os.environ.get("TETHER_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("tether", appauthor=False)


def check_gguf(path: Path) -> None:
    """Refuse a file that is no GGUF file, or one that cannot be read here, before anything slow begins.

    Args:
        path: an existing file.

    Raises:
        ConfigError: the file does not begin as a GGUF file does, or the package that reads them is missing.
    """
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if start != MAGIC:
        raise ConfigError(
            f"The file '{path}' is named .gguf, but begins with {start!r} where a GGUF file has {MAGIC!r}. "
            "It is cut, damaged or something else (a Git LFS pointer is text): download it again."
        )
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f"Reading '{path}' needs the package gguf, which is not installed. Install it with "
            "'pip install tether[gguf]', or give the model as a folder of safetensors."
        )


def converted_folder(path: Path) -> Path:
    """Where the conversion of a GGUF file lies, or will lie: the name is the file's content, not its path.

    Args:
        path: an existing GGUF file.

    Returns:
        A folder below `cache_root()`.
    """
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return cache_root() / "gguf" / f"{digest.hexdigest()}-{CONVERSION}"


def convert_gguf(path: Path) -> Path:
    """The folder of safetensors, bfloat16, that a GGUF file stands for, with its tokenizer and chat template.

    Converts only when no earlier run did. The folder is built under another name and renamed into place, so that a
    killed conversion leaves nothing that looks finished and two at once do not disturb each other.

    Args:
        path: an existing GGUF file.

    Returns:
        A folder that `from_pretrained` loads.

    Raises:
        ConfigError: the file is damaged, of an architecture that transformers does not read, or the cache cannot be
            written.
    """
    folder = converted_folder(path)
    if folder.is_dir():
        return folder
    check_gguf(path)
    logger.info("Converting %s once, to %s", path, folder)
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        unfinished.mkdir()
        with working(f"converting {path.name}"):
            _write(path, unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process may have been first; its result is as good as this one.
            if not folder.is_dir():
                raise
    except OSError as error:
        raise ConfigError(
            f"The GGUF file '{path}' could not be converted into the cache '{folder.parent}': {error}. "
            "Point the environment variable TETHER_CACHE to a folder with room for about twice the model in bfloat16."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write(path: Path, folder: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        # Without dequantize=True the model keeps its packed blocks: not trainable, and save_pretrained refuses it.
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
    except _READING_ERRORS as error:
        raise ConfigError(
            f"The GGUF file '{path}' cannot be read: {error}. Allowed are complete files of architectures that "
            "transformers converts (Llama, Mistral, Qwen2, Qwen3, Gemma 2 and 3, Phi-3 and others). Download the "
            "model as a folder of safetensors instead."
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _remove_stale(folder: Path) -> None:
    """Remove what killed conversions of the same file left; a young one may be another process at work."""
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > STALE_AFTER:
                shutil.rmtree(leftover, ignore_errors=True)
