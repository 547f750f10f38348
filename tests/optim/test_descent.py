"""The example's drawings: what each says, as a number, and a page that needs nothing from outside."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html import escape
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from examples.descent import STORIES, Story, elliptical, numbers, page, stories, svg, trail

from rowgrad.optim import Newton

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def told() -> dict[str, Story]:
    return stories()


@pytest.fixture(scope="module")
def measured(told: dict[str, Story]) -> dict[str, dict[str, float]]:
    return numbers(told)


def test_the_steep_direction_of_the_ellipse_bounces(measured: dict[str, dict[str, float]]) -> None:
    """y is multiplied by 1 - 0.23 * 8 < 0 at each step on the ellipse, by 1 - 0.23 * 2 > 0 on the circle."""
    assert measured["bouncing"]["steps that cross the axis"] == 15
    assert measured["no bouncing"]["steps that cross the axis"] == 0


def test_momentum_damps_the_zig_zag_and_goes_twice_as_far(measured: dict[str, dict[str, float]]) -> None:
    """The velocity on an even slope tends to 1 / (1 - beta) = 2 times the plain step."""
    found = measured["zig-zag"]
    plain = found["height above the floor after 15 steps, gradient descent"]
    assert plain == pytest.approx(0.84**15)
    assert found["height above the floor after 15 steps, momentum"] < plain / 5
    assert found["way along the floor, momentum over gradient descent"] == pytest.approx(2, rel=0.02)


def test_nesterov_overshoots_less(measured: dict[str, dict[str, float]]) -> None:
    found = measured["overshoot"]
    assert found["beyond the minimum, momentum"] == pytest.approx(0.332, abs=1e-3)
    assert found["beyond the minimum, Nesterov momentum"] == pytest.approx(0.184, abs=1e-3)


def test_adagrad_slows_where_rmsprop_does_not(measured: dict[str, dict[str, float]]) -> None:
    """On an even slope AdaGrad's step t is alpha / sqrt(t), RMSProp's tends to alpha."""
    found = measured["slowing"]
    assert found["step 90 over step 30 along the floor, AdaGrad"] == pytest.approx(math.sqrt(30 / 90), rel=1e-6)
    assert found["step 90 over step 30 along the floor, RMSProp"] == pytest.approx(1, rel=0.03)


def test_clipping_keeps_the_weights_at_the_foot_of_the_cliff(measured: dict[str, dict[str, float]]) -> None:
    found = measured["cliff"]
    assert found["longest step, gradient descent"] > 2
    assert found["longest step, norm capped at 1"] == pytest.approx(0.2)


def test_second_order_needs_one_step_two_directions_or_a_few(measured: dict[str, dict[str, float]]) -> None:
    bowl, rosenbrock = measured["second order, bowl"], measured["second order, valley"]
    assert bowl["steps, Newton"] == 1
    assert bowl["steps, conjugate directions"] == 2
    assert min(bowl["steps, BFGS"], bowl["steps, L-BFGS"]) >= 2
    assert max(bowl["steps, BFGS"], bowl["steps, L-BFGS"]) <= 10
    assert rosenbrock["steps, gradient descent"] == math.inf
    assert max(steps for name, steps in rosenbrock.items() if name != "steps, gradient descent") <= 45
    assert "steps, Gauss-Newton" in rosenbrock


def test_the_paths_of_momentum_part(told: dict[str, Story]) -> None:
    """Neither lies on one line, and they are far apart on the way."""
    first, second = told["overshoot"].trails.values()
    assert max(math.dist(a, b) for a, b in zip(first, second, strict=True)) > 0.5
    for points in (first, second):
        assert max(abs(y + 2 / 3 * x) for x, y in points) > 0.5


def test_rmsprop_ends_on_the_floor(told: dict[str, Story]) -> None:
    heights = [abs(y) for _, y in told["slowing"].trails["RMSProp"]]
    assert max(heights[50:]) < 1e-4


def test_who_leaves_the_saddle(told: dict[str, Story], measured: dict[str, dict[str, float]]) -> None:
    found = measured["saddle"]
    assert found["steps until |y| > 1, Newton as printed"] == math.inf
    assert math.dist(told["saddle"].trails["Newton as printed"][-1], (0, 0)) < 1e-12
    assert found["steps until |y| > 1, Newton, signs turned"] <= 8
    assert found["steps until |y| > 1, conjugate gradient"] <= 8
    assert found["steps until |y| > 1, gradient descent"] > 30
    for name in ("Newton, signs turned", "conjugate gradient"):
        x, y = told["saddle"].trails[name][-1]
        assert (x, abs(y)) == pytest.approx((0, math.sqrt(2)), abs=1e-6)


def test_every_story_has_a_drawing_with_its_paths(told: dict[str, Story]) -> None:
    assert told.keys() == STORIES.keys() == numbers(told).keys()
    for story in told.values():
        x0, x1, y0, y1 = story.window
        for points in story.trails.values():
            assert all(x0 <= x <= x1 and y0 <= y <= y1 for x, y in points), story.title
    drawing = svg(told["saddle"])
    texts = {"".join(element.itertext()) for element in ET.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")}
    assert {f"{name} ({len(points) - 1})" for name, points in told["saddle"].trails.items()} <= texts
    assert drawing == svg(told["saddle"])


def test_the_page_asks_for_nothing_and_has_no_name_twice(told: dict[str, Story]) -> None:
    text = page(told)
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*', text)
    assert "@import" not in text
    assert "<script" not in text
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers)) > 0
    assert set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(identifiers)
    assert all(escape(story.title) in text for story in told.values())


def test_it_runs_as_a_script(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "descent.py", "out.html"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "out.html\n"), done.stderr
    assert (tmp_path / "out.html").stat().st_size > 10_000


def test_a_trail_starts_where_it_is_told() -> None:
    assert trail(Newton, elliptical, (1.0, 1.0), 1) == [(1.0, 1.0), (0.0, 0.0)]
    assert torch.get_default_dtype() == torch.float32
