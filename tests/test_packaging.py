"""What is built and what is pinned."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import rowgrad

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as opened:
        yield opened


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = [path.relative_to(ROOT / "src") for path in (ROOT / "src" / "rowgrad").rglob("*") if path.is_file()]
    assert shipped == {path.as_posix() for path in files if not any("cache" in part for part in path.parts)}
    assert "rowgrad/py.typed" in shipped


def test_the_wheel_says_what_it_needs(wheel):
    metadata = email.message_from_bytes(wheel.read(f"rowgrad-{rowgrad.__version__}.dist-info/METADATA"))
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert [re.match(r"[\w-]+", line)[0] for line in needed] == ["torch"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["License-Expression"] == "Apache-2.0"
    command = wheel.read(f"rowgrad-{rowgrad.__version__}.dist-info/entry_points.txt").decode()
    assert "rowgrad = rowgrad.cli:main" in command


def test_there_is_one_version():
    assert PROJECT["version"] == rowgrad.__version__
    assert f"## {rowgrad.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_dependency_is_pinned_to_one_public_version():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            assert re.fullmatch(r"[\d.]+", version), f"{line}: not a plain public version"
            pins[_normal(name)] = version
    extras = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    named = {_normal(re.match(r"[\w-]+", line)[0]) for line in (*PROJECT["dependencies"], *extras)}
    assert not named - pins.keys()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
