"""What gradient descent does on bowls, valleys, cliffs and saddles, and what each remedy changes: a page of
drawings, with a number for each (Aggarwal 2018, ch. 3.4 and 3.5).

    python examples/descent.py descent.html

The page needs nothing from outside. `stories()` gives the paths and `numbers()` what is measured on them.
"""

import argparse
import io
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

from rowgrad.curvature import Hessian
from rowgrad.errors import RowgradWarning
from rowgrad.optim import BFGS, LBFGS, AdaGrad, ConjugateGradient, GaussNewton, GradientClip, Momentum, Newton, RMSProp
from rowgrad.optim.conjugate import conjugate_gradient

Point = tuple[float, float]
Trail = list[Point]
Surface = Callable[[Tensor, Tensor], Tensor]

# Surfaces


def circular(x: Tensor, y: Tensor) -> Tensor:
    return x**2 + y**2


def elliptical(x: Tensor, y: Tensor) -> Tensor:
    return x**2 + 4 * y**2


def valley(x: Tensor, y: Tensor) -> Tensor:
    """Steep sides, and a floor that falls gently and evenly."""
    return 4 * y**2 - x / 5


def curved_valley(x: Tensor, y: Tensor) -> Tensor:
    """Rosenbrock's, with its minimum at (1, 1)."""
    return 100 * (y - x**2) ** 2 + (1 - x) ** 2


def cliff(x: Tensor, y: Tensor) -> Tensor:
    """A plateau that ends at x = 0, three high; the minimum lies beyond its foot, at (1, 0)."""
    return 3 * torch.sigmoid(-20 * x) + 0.1 * (x - 1) ** 2 + y**2


def saddle(x: Tensor, y: Tensor) -> Tensor:
    """A saddle at 0 and minima at y = +-sqrt 2."""
    return x**2 - y**2 + y**4 / 4


# Surfaces as sums of squares, which is what Gauss-Newton is given
SQUARES: dict[Surface, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    curved_valley: lambda x, y: (100 * (y - x**2) ** 2, (1 - x) ** 2),
}


# Paths

SECOND_ORDER = (Newton, ConjugateGradient, BFGS, LBFGS)


def trail(
    method: Callable[..., torch.optim.Optimizer],
    surface: Surface,
    start: Point,
    n: int,
    /,
    *,
    max_norm: float | None = None,
    **options: float | bool,
) -> Trail:
    """Where a method goes in n steps; with Nesterov's momentum the weights, not the place of the gradient."""
    w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = method([w], **options)
    clip = None if max_norm is None else GradientClip([w], max_norm)
    points = [start]
    for _ in range(n):
        if isinstance(optimizer, GaussNewton):
            with warnings.catch_warnings():  # each square has a formula and a backward pass of its own
                warnings.simplefilter("ignore", RowgradWarning)
                optimizer.step(lambda: torch.stack(SQUARES[surface](w[0], w[1])))
            points.append(as_point(w))
            continue
        if isinstance(optimizer, SECOND_ORDER):
            optimizer.step(lambda: surface(w[0], w[1]))
            points.append(as_point(w))
            continue
        optimizer.zero_grad()
        surface(w[0], w[1]).backward()
        if clip is not None:
            clip()
        optimizer.step()
        with optimizer.at_weights():
            points.append(as_point(w))
    return points


def descent(surface: Surface, start: Point, n: int, lr: float, *, max_norm: float | None = None) -> Trail:
    """Plain gradient descent."""
    return trail(Momentum, surface, start, n, max_norm=max_norm, lr=lr, beta=0.0)


def conjugate_directions(surface: Surface, start: Point) -> Trail:
    """The places that the conjugate gradient method visits within one step."""
    w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    H = Hessian(surface(w[0], w[1]), [w])
    stages = conjugate_gradient(lambda v: H @ v, H.gradient, n=2)
    return [start, *(as_point(w + stage.point) for stage in stages)]


def newton_as_printed(surface: Surface, start: Point, n: int) -> Trail:
    """W - H^-1 grad L (eq. 20), which takes no care of saddles."""
    w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    points = [start]
    for _ in range(n):
        H = Hessian(surface(w[0], w[1]), [w])
        w.data -= torch.linalg.solve(H.dense(), H.gradient)
        points.append(as_point(w))
    return points


def as_point(w: Tensor) -> Point:
    x, y = w.tolist()
    return x, y


# Stories


@dataclass
class Story:
    """A surface, the part of it to draw, and the paths on it by name."""

    title: str
    surface: Surface
    window: tuple[float, float, float, float]  # x from, to; y from, to
    trails: dict[str, Trail]
    remark: str


BOWL = (-3.4, 3.4, -2.4, 2.4)
START = (-3.0, 2.0)
RATE = 0.23  # close to 2 / 8, where gradient descent on the elliptical bowl stops converging


def stories() -> dict[str, Story]:
    """Every drawing, by name."""
    return {name: tell() for name, tell in STORIES.items()}


def bouncing() -> Story:
    paths = {"gradient descent": descent(elliptical, START, 15, RATE)}
    return Story(
        "Elliptical bowl: the steep direction bounces", elliptical, BOWL, paths,
        "At a rate that suits the gentle direction, every step crosses the steep one.",
    )  # fmt: skip


def no_bouncing() -> Story:
    paths = {"gradient descent": descent(circular, START, 15, RATE)}
    return Story(
        "Circular bowl: the same rate goes straight down", circular, BOWL, paths,
        "Where the curvature is the same in every direction, the gradient points to the minimum.",
    )  # fmt: skip


def zig_zag() -> Story:
    start = (-3.0, 1.0)
    paths = {
        "gradient descent": descent(valley, start, 60, RATE),
        "momentum": trail(Momentum, valley, start, 60, lr=RATE, beta=0.5),
    }
    return Story(
        "Valley: momentum damps the zig-zag and gains speed along the floor", valley, (-3.4, 3.4, -1.2, 1.2), paths,
        "What points back and forth cancels in the velocity; what always points along the floor adds up.",
    )  # fmt: skip


def overshoot() -> Story:
    paths = {
        "momentum": trail(Momentum, elliptical, START, 40, lr=0.05, beta=0.8),
        "Nesterov momentum": trail(Momentum, elliptical, START, 40, lr=0.05, beta=0.8, nesterov=True),
    }
    return Story(
        "Elliptical bowl: Nesterov's momentum brakes earlier", elliptical, BOWL, paths,
        "The gradient is taken where the velocity is about to lead, so it turns round before the marble does.",
    )  # fmt: skip


def slowing() -> Story:
    start = (-3.0, 1.0)
    paths = {
        "AdaGrad": trail(AdaGrad, valley, start, 90, lr=0.05),
        "RMSProp": trail(RMSProp, valley, start, 90, lr=0.05, rho=0.9),
    }
    return Story(
        "Valley: AdaGrad slows down, RMSProp does not", valley, (-3.4, 3.4, -1.2, 1.2), paths,
        "AdaGrad divides by all squares so far, which only grow; RMSProp forgets the old ones.",
    )  # fmt: skip


def over_the_cliff() -> Story:
    start = (-2.1, 0.8)
    paths = {
        "gradient descent": descent(cliff, start, 40, 0.2),
        "norm capped at 1": descent(cliff, start, 40, 0.2, max_norm=1.0),
    }
    return Story(
        "Cliff: one gradient throws the weights far away, a clipped one does not", cliff, (-2.4, 4.2, -1.2, 1.2), paths,
        "The slope is gentle up to the edge and exact at the edge; it only holds for less than the step.",
    )  # fmt: skip


def second_order_on_a_bowl() -> Story:
    paths = {
        "Newton": trail(Newton, elliptical, START, 1),
        "conjugate directions": conjugate_directions(elliptical, START),
        "BFGS": trail(BFGS, elliptical, START, 12),
        "L-BFGS": trail(LBFGS, elliptical, START, 12, n=1, max_eval=50),
    }
    return Story(
        "Elliptical bowl: Newton takes one step, conjugate gradients two", elliptical, BOWL, paths,
        "The inverse Hessian turns the gradient towards the minimum; no step size is needed.",
    )  # fmt: skip


def second_order_in_a_valley() -> Story:
    start = (-1.2, 1.0)
    paths = {
        "gradient descent": descent(curved_valley, start, 2000, 1e-3),
        "Newton": trail(Newton, curved_valley, start, 40),
        "conjugate gradient": trail(ConjugateGradient, curved_valley, start, 40),
        "BFGS": trail(BFGS, curved_valley, start, 60),
        "L-BFGS": trail(LBFGS, curved_valley, start, 60, n=1, max_eval=50),
        "Gauss-Newton": trail(GaussNewton, curved_valley, start, 40),
    }
    return Story(
        "Curved valley: methods that see the curvature follow it", curved_valley, (-1.6, 1.4, -0.6, 1.6), paths,
        "Gradient descent needs a rate for the steep sides and then creeps along the floor.",
    )  # fmt: skip


def at_the_saddle() -> Story:
    start = (-1.5, 0.02)
    paths = {
        "gradient descent": descent(saddle, start, 60, 0.05),
        "Newton as printed": newton_as_printed(saddle, start, 10),
        "Newton, signs turned": trail(Newton, saddle, start, 10),
        "conjugate gradient": trail(ConjugateGradient, saddle, start, 10),
    }
    return Story(
        "Saddle: Newton's update ends on it, unless negative curvature is turned round", saddle, (-1.8, 1.8, -2.0, 2.0),
        paths, "Solving for a gradient of 0 finds saddles and maxima as well as minima.",
    )  # fmt: skip


STORIES: dict[str, Callable[[], Story]] = {
    "no bouncing": no_bouncing,
    "bouncing": bouncing,
    "zig-zag": zig_zag,
    "overshoot": overshoot,
    "slowing": slowing,
    "cliff": over_the_cliff,
    "second order, bowl": second_order_on_a_bowl,
    "second order, valley": second_order_in_a_valley,
    "saddle": at_the_saddle,
}


# Numbers


def numbers(told: dict[str, Story]) -> dict[str, dict[str, float]]:
    """What is measured on each story, by what it says."""
    bowl, ellipse, zig = told["no bouncing"], told["bouncing"], told["zig-zag"]
    marble, slow, edge = told["overshoot"], told["slowing"], told["cliff"]
    plain, momentum = zig.trails["gradient descent"], zig.trails["momentum"]
    return {
        "no bouncing": {"steps that cross the axis": crossings(bowl.trails["gradient descent"])},
        "bouncing": {"steps that cross the axis": crossings(ellipse.trails["gradient descent"])},
        "zig-zag": {
            "height above the floor after 15 steps, gradient descent": abs(plain[15][1]),
            "height above the floor after 15 steps, momentum": abs(momentum[15][1]),
            "way along the floor, momentum over gradient descent": way(momentum) / way(plain),
        },
        "overshoot": {f"beyond the minimum, {name}": max(x for x, _ in t) / 3 for name, t in marble.trails.items()},
        "slowing": {f"step 90 over step 30 along the floor, {name}": slowed(t) for name, t in slow.trails.items()},
        "cliff": {f"longest step, {name}": longest(t) for name, t in edge.trails.items()},
        "second order, bowl": steps_needed(told["second order, bowl"], (0.0, 0.0)),
        "second order, valley": steps_needed(told["second order, valley"], (1.0, 1.0)),
        "saddle": {
            f"steps until |y| > 1, {name}": first(abs(y) > 1 for _, y in t) for name, t in told["saddle"].trails.items()
        },
    }


def crossings(points: Trail) -> float:
    return sum(a[1] * b[1] < 0 for a, b in pairwise(points))


def way(points: Trail) -> float:
    return points[-1][0] - points[0][0]


def slowed(points: Trail) -> float:
    """Step 90 along the floor over step 30."""
    return (points[90][0] - points[89][0]) / (points[30][0] - points[29][0])


def longest(points: Trail) -> float:
    return max(math.dist(a, b) for a, b in pairwise(points))


def steps_needed(story: Story, minimum: Point) -> dict[str, float]:
    """Steps until 1e-6 from the minimum."""
    return {f"steps, {name}": first(math.dist(p, minimum) < 1e-6 for p in t) for name, t in story.trails.items()}


def first(tests: Iterable[bool]) -> float:
    """The number of the first that holds; inf where none does."""
    return next((float(k) for k, holds in enumerate(tests) if holds), math.inf)


# Drawing

COLORS = ("#b8400e", "#2f5d8a", "#3d7a4a", "#7a4b94", "#c08a00", "#1a9a9a")
STYLE = """body { margin: 0 auto; padding: 16px 20px 48px; max-width: 860px; background: #f7f6f3; color: #1d1c1a;
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 36px 0 4px; } svg { width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
td { padding: 2px 18px 2px 0; border-bottom: 1px solid #e2dfd9; } p { margin: 0 0 6px; }"""


def svg(story: Story) -> str:
    """The paths over the contour lines of the surface."""
    x0, x1, y0, y1 = story.window
    x, y = torch.meshgrid(torch.linspace(x0, x1, 160), torch.linspace(y0, y1, 160), indexing="xy")
    z = story.surface(x, y)
    levels = torch.quantile(z.flatten(), torch.linspace(0.01, 0.97, 14)).unique()
    figure = Figure(figsize=(8, 8 * max(0.4, min(0.75, (y1 - y0) / (x1 - x0)))), layout="constrained")
    axes = figure.add_subplot()
    axes.contour(x.numpy(), y.numpy(), z.numpy(), levels=levels.tolist(), colors="#c9c4ba", linewidths=0.8)
    for (name, points), color in zip(story.trails.items(), COLORS, strict=False):
        xs, ys = zip(*points, strict=True)
        dots = "o" if len(points) < 200 else None
        axes.plot(xs, ys, color=color, marker=dots, markersize=3, linewidth=1.3, label=f"{name} ({len(points) - 1})")
    axes.set(xlim=(x0, x1), ylim=(y0, y1), xlabel="x", ylabel="y")
    axes.legend(loc="best", title="steps in brackets", framealpha=0.9)
    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": story.title}):  # text as text; the same names in every run
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(story.title)}"', 1)


def page(told: dict[str, Story]) -> str:
    """All stories, each with its numbers."""
    measured = numbers(told)
    parts = [
        f"<h2>{escape(story.title)}</h2><p>{escape(story.remark)}</p>{_unique(svg(story), k)}{_table(measured[name])}"
        for k, (name, story) in enumerate(told.items())
    ]
    head = f'<meta charset="utf-8"><title>Ways down</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>Ways down</h1>{"".join(parts)}</body></html>\n'


def _unique(drawing: str, k: int) -> str:
    """The drawing with identifiers of its own, for a page of several."""
    for before in ('id="', 'href="#', "url(#"):
        drawing = drawing.replace(before, f"{before}d{k}-")
    return drawing


def _table(values: dict[str, float]) -> str:
    rows = (f"<tr><td>{escape(name)}</td><td>{value:.3g}</td></tr>" for name, value in values.items())
    return f"<table>{''.join(rows)}</table>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", type=Path, default=Path("descent.html"), help="file to be written")
    target = parser.parse_args().target
    target.write_text(page(stories()), encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
