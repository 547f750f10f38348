"""What the commands of the benchmark take for numbers, refused where they make no sense."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def whole_number(least: int) -> Callable[[str], int]:
    """A whole number from `least` on."""

    def parse(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value}: expected {least} or more")
        return value

    return parse


def duration(text: str) -> float:
    """A positive number of seconds."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected a positive number of seconds")
    return value
