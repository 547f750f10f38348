"""Flags, the sentences that give their reasons, and the table of it all."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import polars as pl
import pytest
import torch
import torch.nn.functional as F

from rowgrad.errors import InputError
from rowgrad.uses.audit import Audit
from rowgrad.uses.scores import FLAGS

N, VISITS = 12, 20
WRONG, HARD, NEVER, REDUNDANT, SPIKING = range(5)


def _audit(n_classes: int | None = 2, norms: bool = True) -> Audit:
    """Twelve examples of which the first five each show one behavior."""
    audit = Audit(N, n_classes)
    labels = torch.zeros(N, dtype=torch.int64)
    for visit in range(VISITS):
        margin = torch.linspace(1.0, 2.0, N)
        margin[WRONG] = -3 if visit < 15 else 4  # learned by heart at the end
        margin[HARD] = 30 if visit % 2 else -2.5
        margin[NEVER] = -0.01
        margin[REDUNDANT] = 9
        logits = torch.stack([margin, torch.zeros(N)], dim=1)
        losses = F.cross_entropy(logits, labels, reduction="none")
        size = losses.clone()
        size[SPIKING] = 40.0 if visit == 9 else 0.1
        outputs = {} if n_classes is None else {"logits": logits, "labels": labels}
        audit.update(torch.arange(N), losses=losses, norms=size if norms else None, lr=0.1, **outputs)
    return audit


def test_each_behavior_is_flagged() -> None:
    flags = _audit().compute().flags
    assert tuple(flags) == FLAGS
    found = {name: mask.nonzero()[:, 0].tolist() for name, mask in flags.items()}
    assert found == {
        "likely mislabelled": [WRONG, NEVER],
        "hard": [HARD],
        "never learned": [NEVER],
        "redundant": [REDUNDANT],
        "spiking": [SPIKING],
    }


def test_reasons_name_their_figures() -> None:
    scores = _audit().compute()
    assert scores.reason(WRONG) == (
        f"Over 20 visits the network gave label 1 a mean probability of {scores.suggested_probability[WRONG]:.2f} "
        f"and the given label 0 one of {scores.confidence[WRONG]:.2f}."
    )
    low, high = (float(scores.mean_loss[~scores.flagged].sort().values[k]) for k in (2, 7))
    assert scores.reason(HARD) == (
        f"Its mean loss of {scores.mean_loss[HARD]:.3g} is far above the usual, beyond {high + 3 * (high - low):.3g}."
    )
    assert scores.reason(NEVER).endswith("The network predicted another label at each of 20 visits.")
    median = float(scores.self_influence.sort().values[6])
    assert scores.reason(REDUNDANT) == (
        f"Learned at visit 1 and never forgotten; its self-influence of {scores.self_influence[REDUNDANT]:.2g} is "
        f"below a tenth of the median, {median:.2g}."
    )
    assert scores.reason(SPIKING) == "Its gradient norm rose to 40 at visit 10, 19.1 times its mean."
    assert scores.reason(N - 1) == ""


def test_without_labels_and_norms_two_flags_are_left() -> None:
    audit = Audit(3)
    audit.update(torch.arange(3), losses=torch.tensor([1.0, 1.1, 0.01]))
    assert list(audit.compute().flags) == ["hard", "redundant"]
    assert audit.compute().reason(2) == "Its mean loss of 0.01 is below a tenth of the median, 1."


def test_nothing_seen_flags_nothing() -> None:
    flags = Audit(3, 2).compute().flags
    assert not any(mask.any() for mask in flags.values())


@pytest.mark.parametrize(("n_classes", "norms"), [(2, True), (2, False), (None, False)])
def test_the_tables_hold_the_same(tmp_path: Path, n_classes: int | None, norms: bool) -> None:
    audit = _audit(n_classes, norms)
    frame = audit.table()
    scores = audit.compute()
    assert frame["index"].to_list() == list(range(N))
    assert frame["rank"].to_list() == scores.rank.tolist()
    assert frame["mean_loss"].to_list() == scores.mean_loss.tolist()
    assert frame["reason"].to_list() == [scores.reason(k) for k in range(N)]
    assert ("never_learned" in frame.columns) == ("variability" in frame.columns) == (n_classes is not None)
    assert ("self_influence" in frame.columns) == norms
    assert audit.table(tmp_path / "scores.parquet") == tmp_path / "scores.parquet"
    assert pl.read_parquet(tmp_path / "scores.parquet").equals(frame)
    pandas = audit.table("pandas")
    assert isinstance(pandas, pd.DataFrame)
    assert pandas.to_dict("list") == frame.to_dict(as_series=False)


def test_a_table_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match=r'table\(.scores.csv.\): expected "polars", "pandas" or a path that ends'):
        _audit().table("scores.csv")


@pytest.mark.parametrize(("to", "library"), [("polars", "polars"), ("s.parquet", "polars"), ("pandas", "pandas")])
def test_what_is_missing_is_named(to: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=f"needs {library}; install it with pip install "):
        _audit().table(to)


def test_where_all_norms_are_restless_none_spikes() -> None:
    """Dropout lifts many norms to six times their mean; only the one that rises to thirty stands out."""
    n, generator = 100, torch.Generator().manual_seed(0)
    audit = Audit(n)
    for visit in range(20):
        norms = torch.full((n,), 0.5)
        norms[visit * 5 : visit * 5 + 5] = 6 + torch.rand(5, generator=generator)
        norms[7] = 100.0 if visit == 9 else 0.5
        audit.update(torch.arange(n), losses=torch.rand(n, generator=generator), norms=norms)
    scores = audit.compute()
    assert scores.peak_norm is not None
    assert scores.mean_norm is not None
    assert int((scores.peak_norm > 5 * scores.mean_norm).sum()) == n
    assert scores.flags["spiking"].nonzero().flatten().tolist() == [7]


def _judged(agreed: int, classes: int = 3) -> Audit:
    """Of 90 examples in equal classes, `agreed` are given their label."""
    audit, labels = Audit(100, classes), torch.arange(90) % classes
    shown = torch.where(torch.arange(90) < agreed, labels, (labels + 1) % classes)
    logits = F.one_hot(shown, classes).double()
    audit.update(torch.arange(90), losses=torch.ones(90), logits=logits, labels=labels)
    return audit


@pytest.mark.parametrize(
    ("agreed", "said"),
    [
        (31, "gave 34% of the examples their label, hardly more than the largest class makes up (33%)"),
        (50, "44% of the examples are flagged"),
        (61, ""),
        (90, ""),
    ],
)
def test_flags_of_a_network_that_learned_little_are_doubted(agreed: int, said: str) -> None:
    doubt = _judged(agreed).compute().doubt
    assert said in doubt
    assert bool(said) is bool(doubt)


def test_nothing_is_doubted_without_labels() -> None:
    assert _audit(n_classes=None).compute().doubt == ""
    assert Audit(3, 2).compute().doubt == ""
