"""Drawings of a diagnosis as SVG that needs nothing from outside."""

from __future__ import annotations

from collections.abc import Sequence

from rowgrad.diagnosis.reading import Point
from rowgrad.diagnosis.steps import Along


def curves_chart(points: Sequence[Point]) -> str:
    return ""


def along_chart(along: Along) -> str:
    return ""
