"""The page on the seeds names every test here, and no other."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "seeds.md"


def test_the_page_and_the_tests_name_the_same() -> None:
    written = [
        name for file in HERE.glob("test_seed_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    ]
    named = re.findall(r"`(test_\w+)`", PAGE.read_text(encoding="utf-8"))
    assert len(written) == len(set(written)) > 60
    assert set(named) == set(written)
