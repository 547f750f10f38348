"""One HTML file around what the library's objects give as `to_html()`."""

import shlex
from collections.abc import Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("rowgrad.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )


def plain_page(title: str, sections: Sequence[str], command: Sequence[str] = ()) -> str:
    """A page that needs nothing else.

    Args:
        title: its heading.
        sections: HTML, as `to_html()` returned it.
        command: the command line that made it.
    """
    template = _environment().get_template("plain.html.j2")
    return template.render(title=title, sections=[Markup(s) for s in sections], command=shlex.join(command))
