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
        f"Its mean loss of {scores.mean_loss[HARD]:.3g} is far above the usual, beyond {high + 3 * (high - low):.3g}, "
        f"and its label had a mean probability of {scores.confidence[HARD]:.2f}."
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


@pytest.mark.parametrize(("to", "said"), [("scores.csv", "'scores.csv'"), (3, "3"), (None, "None")])
def test_a_table_of_another_kind_is_refused(to: object, said: str) -> None:
    with pytest.raises(InputError, match=rf'table\({said}\): expected "polars", "pandas" or a path that ends'):
        _audit().table(to)


def test_what_was_never_seen_has_no_values(tmp_path: Path) -> None:
    """Nulls: left out of means and comparisons, where NaN is the largest of all."""
    audit = Audit(3, 2)
    audit.update(
        torch.tensor([1, 2]), losses=torch.tensor([1.0, 2.0]), logits=torch.eye(2), labels=torch.tensor([0, 0])
    )
    frame = audit.table()
    assert frame.sort("mean_loss", descending=True, nulls_last=True)["index"].to_list() == [2, 1, 0]
    assert frame["mean_loss"].max() == 2.0
    unseen = frame.row(0, named=True)
    known = {"index": 0, "rank": 3, "times_seen": 0, "reason": ""}
    flags = dict.fromkeys((name.replace(" ", "_") for name in audit.compute().flags), False)
    assert unseen == dict.fromkeys(frame.columns) | known | flags
    assert audit.table("pandas")["mean_loss"].isna().tolist() == [True, False, False]
    assert pl.read_parquet(audit.table(tmp_path / "scores.parquet")).equals(frame)


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


def test_what_is_flipped_for_calibration_is_no_reason_to_doubt() -> None:
    """Half of the labels are flipped, and the network gave all examples the label before."""
    audit, labels = Audit(90, 2, calibrate=0.5), torch.arange(90) % 2
    planted = audit.plant(torch.arange(90), labels)
    audit.update(torch.arange(90), losses=torch.ones(90), logits=F.one_hot(labels, 2).double(), labels=planted)
    assert audit.compute().calibration.n_found == 45
    assert audit.compute().doubt == ""


def test_a_fitted_example_is_not_hard() -> None:
    """Its loss is hundreds of times the others', and its label had a probability of .88 throughout."""
    audit, margin = Audit(N, 2), torch.full((N,), 9.0)
    margin[0], margin[1] = 2.0, 0.5
    logits, labels = torch.stack([margin, torch.zeros(N)], 1), torch.zeros(N, dtype=torch.int64)
    losses = F.cross_entropy(logits, labels, reduction="none")
    audit.update(torch.arange(N), losses=losses, logits=logits, labels=labels)
    assert audit.compute().flags["hard"].nonzero().flatten().tolist() == [1]
    without = Audit(N)
    without.update(torch.arange(N), losses=losses)
    assert without.compute().flags["hard"].nonzero().flatten().tolist() == [0, 1]
    assert without.compute().reason(0).startswith("Its mean loss of 0.127 is far above the usual, beyond 0.000123.")


def test_nothing_is_doubted_without_labels() -> None:
    assert _audit(n_classes=None).compute().doubt == ""
    assert Audit(3, 2).compute().doubt == ""
