"""Drawings of a graph: text, SVG and a page of HTML, at the level of detail that fits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from rowgrad.files import whole
from rowgrad.graph.boxes import EdgeKey, Marks, Picture, drawn, marks, picture
from rowgrad.graph.detail import MAX_BOXES, level, levels
from rowgrad.graph.flow import Flow
from rowgrad.graph.listing import listing
from rowgrad.graph.page import page
from rowgrad.graph.paths import Path
from rowgrad.graph.shares import Shares
from rowgrad.graph.svg import standalone
from rowgrad.graph.variables import Key, Variables

N_DRAWN = 300  # boxes of a level that a page still shows


class Drawable(Variables):
    """The variables of a graph as a picture.

    All drawings show boxes of operations, grouped by module so that no box is before and behind another, and set
    parameters aside: they are written into the box that they enter. They take the same marks:

    Args:
        depth: how many parts of a module's name tell boxes apart: 0 for one box in all, 1 for outermost modules; more
            than the names have for every operation. Default None: the most detail of at most `max_boxes` boxes.
        max_boxes: the most boxes where `depth` leaves a choice.
        flow: what `backward()` returned; writes the size of the cotangent of what leaves each box.
        shares: {(operation, slot): share of a gradient}, as `shares(w)` returns them; percents and widths of arrows.
        labels: {(operation, slot): text or number} for arrows.
        to: a variable, whose paths to the losses stand out, or one `Path`.
    Raises:
        GraphError: marks of another graph, an edge that is none, a variable without a path, a negative depth.
    """

    def to_text(
        self,
        depth: int | None = None,
        *,
        max_boxes: int = MAX_BOXES,
        flow: Flow | None = None,
        shares: Shares | Mapping[EdgeKey, float] | None = None,
        labels: Mapping[EdgeKey, str | float] | None = None,
        to: Key | Path | None = None,
    ) -> str:
        """A line for each box, in the order of the forward pass, at most 100 columns wide. Arguments: `Drawable`.

        >>> import torch, rowgrad
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
        >>> graph = rowgrad.Graph(model(torch.ones(2, 3)).sum(), model)
        >>> graph.to_text(1).splitlines()[-1]
        '   2 2: addmm, sum   scalar  5'
        """
        return listing(self._picture(depth, max_boxes, marks(self, labels, shares, flow, to)), facts(self))

    def to_svg(
        self,
        depth: int | None = None,
        *,
        max_boxes: int = MAX_BOXES,
        flow: Flow | None = None,
        shares: Shares | Mapping[EdgeKey, float] | None = None,
        labels: Mapping[EdgeKey, str | float] | None = None,
        to: Key | Path | None = None,
    ) -> str:
        """A layered drawing whose arrows all point down, as SVG that needs nothing else. Arguments: `Drawable`.

        >>> import torch, rowgrad
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> rowgrad.Graph((w * w).cos(), {"w": w}).to_svg().count('class="arrow"')
        1
        """
        return standalone(self._picture(depth, max_boxes, marks(self, labels, shares, flow, to)), facts(self))

    def to_html(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        depth: int | None = None,
        max_boxes: int = MAX_BOXES,
        flow: Flow | None = None,
        shares: Shares | Mapping[EdgeKey, float] | None = None,
        labels: Mapping[EdgeKey, str | float] | None = None,
        to: Key | Path | None = None,
        below: Sequence[str] = (),
    ) -> str:
        """A page with a drawing for each level of detail, to be switched without a script or network. Arguments:
        `Drawable`; `depth` and `max_boxes` choose the level shown first.

        Args:
            path: a file to be written, whole or not at all; default None.
            below: HTML or SVG to be shown below the drawing, for instance a chart of a decomposition.
        Returns:
            The page.

        >>> import torch, rowgrad
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> rowgrad.Graph((w * w).cos(), {"w": w}).to_html()[:15]
        '<!DOCTYPE html>'
        """
        found = marks(self, labels, shares, flow, to)
        first = self._picture(depth, max_boxes, found)
        text = page(first, self._pictures(first, found), facts(self), below)
        if path is not None:
            with whole(path) as stage:
                stage.write_text(text, encoding="utf-8")
        return text

    def _repr_svg_(self) -> str:
        return self.to_svg()

    def _picture(self, depth: int | None, max_boxes: int, found: Marks) -> Picture:
        shown = drawn(self)
        return picture(self, shown, level(shown, depth, max_boxes), found)

    def _pictures(self, first: Picture, found: Marks) -> list[Picture]:
        """All levels that can be taken in, `first` among them; the coarsest first."""
        shown = drawn(self)
        pictures = [picture(self, shown, grouping, found) for grouping in levels(shown) if len(grouping) <= N_DRAWN]
        if first not in pictures:
            pictures.append(first)
        return sorted(pictures, key=lambda p: len(p.boxes))


def facts(graph: Variables) -> str:
    """How large the graph is, in words."""
    n_edges = sum(t is not None for v in graph.vertices for t in v.inputs)
    return f"{len(graph)} variables, {n_edges} edges, {len(graph.parameters)} parameters"
