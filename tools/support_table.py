"""Write what has a rule into docs/support.md, and a summary into README.md, from the rules themselves.

python tools/support_table.py          # write
python tools/support_table.py --check  # fail if what is committed differs
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from rowgrad import RULES
from rowgrad.rows.site import Rule

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- begin of the table from tools/support_table.py -->\n", "<!-- end of that table -->\n"
HEAD = """# What has a rule

A rule gives the rows of a parameter in factors, at about the price of the backward pass. This page is generated from
the rules (`python tools/support_table.py`). Each line is a way in which a parameter meets the data, with the nodes of
autograd's graph at which that happens and which of their inputs the parameter is.

Not in the tables: views, slices, splits, transposes, reshapes and casts between a parameter and its use; they are
followed. Parameters that are computed from others (weight norm, merged low-rank updates, masks of pruned weights,
functions of single entries such as softplus and fake quantization) use the rule of the place where the computed weight
meets the data, and are pushed down from there. Where a step in between keeps no factors (normalized rows, cumulative
sums) the rows are written out and taken through it one by one: exact, with a warning where a parameter's rows hold a
million numbers or more. Activations, pooling, dropout, attention and losses have no parameters and need no rule.
Whatever is not covered goes the general path: exact, one partial backward pass an example, with a warning.
"""

# The module of a family of rules: title and what it is in a model.
FAMILIES = {
    "linear": ("Linear layers", "`nn.Linear`, `F.linear`, `@` and `einsum` of any rank, the projections of attention"),
    "products": ("Other products", "`torch.bmm`, `nn.Bilinear`, stacks of matrices, experts, vectors"),
    "convolution": (
        "Convolutions",
        "`nn.Conv1d` to `nn.ConvTranspose3d`, every stride, dilation, padding and grouping",
    ),
    "lookup": ("Lookups", "`nn.Embedding`, `nn.EmbeddingBag`, indexing a table, dense or sparse"),
    "normalization": ("Normalizations", "`nn.LayerNorm`, `nn.RMSNorm`, `nn.GroupNorm`, instance and batch norm"),
    "recurrent": ("Recurrent layers", "`nn.LSTM` in one node; `nn.GRU`, `nn.RNN` and cells unroll into linear layers"),
    "site": ("Sums and scales", "biases, gates, temperatures, `nn.PReLU`, position embeddings, class tokens"),
}

Nodes = dict[str, set[int]]


def pages() -> dict[Path, str]:
    """Each file with what it should hold."""
    families = _families()
    page = HEAD + "".join(_section(*FAMILIES[name], lines) for name, lines in families.items())
    head, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    return {PAGE: page, README: head + BEGIN + _summary(families) + END + tail}


def _families() -> dict[str, dict[str, Nodes]]:
    """Family -> sentence -> nodes and slots."""
    families: dict[str, dict[str, Nodes]] = {name: {} for name in FAMILIES}
    for (kind, slot), rule in sorted(RULES.items()):
        family, sentence = about(rule)
        nodes = families[family].setdefault(sentence, {})
        nodes.setdefault(kind.partition("Backward")[0], set()).add(slot)
    empty = [name for name, lines in families.items() if not lines]
    if empty:
        raise SystemExit(f"no rule is left in the family {empty[0]}; take it out of {Path(__file__).name}")
    return families


def _summary(families: dict[str, dict[str, Nodes]]) -> str:
    lines = ["| family | in a model | nodes of the graph |", "|---|---|---|"]
    for name, (title, what) in FAMILIES.items():
        kinds = sorted({kind for nodes in families[name].values() for kind in nodes})
        lines.append(f"| {title} | {what} | {', '.join(kinds)} |")
    return "\n".join(lines) + "\n"


def about(rule: Rule) -> tuple[str, str]:
    """Family of a rule and the sentence that describes it."""
    function = rule.func if isinstance(rule, partial) else rule
    family = function.__module__.rpartition(".")[2]
    sentence = (function.__doc__ or "").strip().partition("\n")[0].rstrip(".")
    if not sentence:
        raise SystemExit(f"{function.__name__} in {function.__module__} has no docstring to show in the table")
    if family not in FAMILIES:
        raise SystemExit(f"{function.__module__} is not among the families; give it a line in {Path(__file__).name}")
    return family, sentence


def _section(title: str, what: str, lines: dict[str, Nodes]) -> str:
    head = "| how a parameter meets the data | nodes and inputs |\n|---|---|\n"
    table = "".join(f"| {sentence} | {_places(nodes)} |\n" for sentence, nodes in sorted(lines.items()))
    return f"\n## {title}\n\n{what[0].upper()}{what[1:]}.\n\n{head}{table}"


def _places(nodes: Nodes) -> str:
    return "; ".join(f"`{kind}` {' '.join(map(str, sorted(slots)))}" for kind, slots in sorted(nodes.items()))


def main() -> None:
    for path, text in pages().items():
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{path.name} is not what the rules say; run python tools/support_table.py")


if __name__ == "__main__":
    main()
