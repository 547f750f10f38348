"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name to write to in the place of `path`; at the end of the block it becomes `path`, by one rename.

    After an error `path` is what it was before, and nothing is left beside it.

    Raises:
        FileNotFoundError: the directory is not there.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no directory {path.parent}; make it first")
    stage = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield stage
        stage.replace(path)
    finally:
        with contextlib.suppress(OSError):
            stage.unlink()
