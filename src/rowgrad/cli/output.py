"""A directory of results that appears whole or not at all."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from rowgrad.errors import InputError
from rowgrad.files import whole


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `directory` at the end, or whose files take their places in it.

    Guarantees: until the block has ended without an exception nothing in `directory` changes; then a new directory
    appears by one rename, and in an existing one each file is replaced by one rename and other files stay. The
    temporary folder, `.rowgrad-` and eight letters (beside a new directory, inside an existing one), is gone then and
    after an exception. A process that is killed outright (SIGKILL, a power cut) leaves it: nothing reads it again, and
    since no process can tell whose it is on a shared disk, removing it is left to the user.

    Raises:
        InputError: `directory` cannot be written; raised before the block runs.
    """
    directory = Path(os.path.abspath(directory))
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--out {directory}: this is a file; name a directory")
    parent = next(folder for folder in (directory, *directory.parents) if folder.exists())
    stage = parent / f".rowgrad-{secrets.token_hex(4)}"
    try:
        stage.mkdir()
    except OSError as error:
        raise InputError(
            f"--out {directory}: cannot be written ({error.strerror}); choose another directory"
        ) from error
    try:
        yield stage
        _publish(stage, directory)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _publish(stage: Path, directory: Path) -> None:
    if directory.is_dir():
        for file in sorted(stage.iterdir()):
            file.replace(directory / file.name)
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    stage.replace(directory)


def write_text(option: str, path: Path, text: str) -> None:
    """Write a file, whole or not at all.

    Raises:
        InputError: `path` cannot be written; `option` is what the user gave it as.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as stage:
            stage.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written ({error.strerror}); name another file") from error


def kind_of(option: str, path: Path, kinds: tuple[str, ...]) -> str:
    """The kind of a file by its ending.

    Raises:
        InputError: an ending that is none of `kinds`.
    """
    kind = path.suffix.removeprefix(".").lower()
    if kind not in kinds:
        raise InputError(f"{option} {path}: a name ends in {' or '.join('.' + k for k in kinds)}")
    return kind
