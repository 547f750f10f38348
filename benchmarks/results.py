"""Files of results: what was measured, on what, and when; written so that a reader never sees half a file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
ALONE = "timed once, alone"  # why a method that is right was not timed with the others
PACKAGES = ("torch", "opacus", "backpack-for-pytorch", "torchjd", "captum")


def about(threads: int) -> dict[str, Any]:
    """Machine, versions and commit."""
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {_memory():.0f} GiB, {platform.system()}",
        "threads": threads,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def begun(path: Path, threads: int, *, tiny: bool = False, fresh: bool = False) -> dict[str, Any]:
    """The file's content with what is measured now told in it.

    Raises:
        SystemExit: it was measured otherwise, and what is added would stand beside other things.
    """
    content, now = read(path), about(threads) | {"tiny": tiny}
    before = content.get("about", {})
    odd = [key for key in ("machine", "threads", "versions", "tiny") if key in before and before[key] != now[key]]
    if odd and not fresh:
        told = "; ".join(f"{key} was {before[key]} and is {now[key]}" for key in odd)
        raise SystemExit(f"{path}: {told}. Choose another --file, or measure all of it again with --fresh")
    return ({} if fresh else content) | {"about": now}


def commit() -> str:
    """The commit of the source, with a plus sign where it was changed since."""
    root = Path(__file__).parent
    try:
        found = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", "../src", ".", ":!results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True).stdout.strip()


def read(path: Path) -> dict[str, Any]:
    """The file's content, or an empty dictionary where there is none.

    Raises:
        SystemExit: it is no file of results.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: no file of results ({error}); choose another --file") from error
    if not isinstance(content, dict):
        raise SystemExit(f"{path}: no file of results, it holds a {type(content).__name__}; choose another --file")
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(path)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
