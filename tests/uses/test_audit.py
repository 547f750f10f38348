"""The accumulator: means over updates, the trajectory rule, and what it refuses."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rowgrad.errors import InputError, RowgradWarning
from rowgrad.uses.audit import Audit
from rowgrad.uses.scores import AuditScores

N, CLASSES, EPOCHS, BATCH = 23, 4, 5, 6
RATES = torch.tensor([0.1, 0.2, 0.4, 0.2, 0.05])


def _course(seed: int = 0) -> dict[str, torch.Tensor]:
    """Made-up training: logits (EPOCHS, N, CLASSES), labels (N,), losses and norms (EPOCHS, N)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(EPOCHS, N, CLASSES, generator=generator)
    labels = torch.randint(CLASSES, (N,), generator=generator)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(EPOCHS), reduction="none").view(EPOCHS, N)
    return {
        "logits": logits,
        "labels": labels,
        "losses": losses,
        "norms": torch.rand(EPOCHS, N, generator=generator),
    }


def _fed(course: dict[str, torch.Tensor], seed: int = 0) -> Audit:
    """An audit fed with the course in shuffled batches."""
    return _feed(Audit(N, CLASSES), course, seed)


def _feed(audit: Audit, course: dict[str, torch.Tensor], seed: int = 0) -> Audit:
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(EPOCHS):
        for index in torch.randperm(N, generator=generator).split(BATCH):
            audit.update(
                index,
                losses=course["losses"][epoch, index],
                norms=course["norms"][epoch, index],
                logits=course["logits"][epoch, index],
                labels=course["labels"][index],
                lr=float(RATES[epoch]) * len(index),  # as if each example made a step of its own
            )
    return audit


def _equal(one: AuditScores, other: AuditScores) -> None:
    for field in dataclasses.fields(one):
        values, expected = getattr(one, field.name), getattr(other, field.name)
        if isinstance(values, torch.Tensor):
            torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True, msg=field.name)
        else:
            assert values == expected, field.name


def test_scores_are_those_of_the_whole_course() -> None:
    course = _course()
    scores = _fed(course).compute()
    probabilities = course["logits"].softmax(2).mean(0)
    labels = course["labels"]
    given = course["logits"].gather(2, labels.expand(EPOCHS, N)[..., None])[..., 0]
    others = course["logits"].masked_fill(F.one_hot(labels, CLASSES).bool(), -torch.inf).amax(2)

    torch.testing.assert_close(scores.mean_loss, course["losses"].mean(0))
    torch.testing.assert_close(scores.final_loss, course["losses"][-1])
    torch.testing.assert_close(scores.mean_norm, course["norms"].mean(0))
    torch.testing.assert_close(scores.final_norm, course["norms"][-1])
    torch.testing.assert_close(scores.peak_norm, course["norms"].amax(0))
    assert torch.equal(scores.peak_visit, course["norms"].argmax(0) + 1)
    given_probabilities = course["logits"].softmax(2).gather(2, labels.expand(EPOCHS, N)[..., None])[..., 0]
    torch.testing.assert_close(scores.variability, given_probabilities.std(0, correction=0))
    is_right = course["logits"].argmax(2) == labels
    assert scores.times_forgotten.tolist() == (is_right[:-1] & ~is_right[1:]).sum(0).tolist()
    first = [next((k for k, right in enumerate(rights, start=1) if right), 0) for rights in is_right.T.tolist()]
    assert scores.first_learned.tolist() == first
    assert 0 in first
    torch.testing.assert_close(scores.self_influence, (RATES[:, None] * course["norms"].square()).sum(0))
    torch.testing.assert_close(scores.mean_margin, (given - others).mean(0))
    assert torch.equal(scores.suggested, probabilities.argmax(1))
    torch.testing.assert_close(scores.suggested_probability, probabilities.amax(1))
    torch.testing.assert_close(scores.confidence, probabilities.gather(1, labels[:, None])[:, 0])
    assert torch.equal(scores.flagged, probabilities.argmax(1) != labels)
    assert torch.equal(scores.times_seen, torch.full((N,), EPOCHS))
    assert torch.equal(scores.order(), course["losses"].double().mean(0).argsort(descending=True))
    assert torch.equal(scores.rank.sort().values, torch.arange(1, N + 1))


@pytest.mark.parametrize("seed", range(1, 6))
def test_batches_and_their_order_do_not_matter(seed: int) -> None:
    course = _course()
    one, other = _fed(course, seed=0).compute(), _fed(course, seed=seed).compute()
    _equal(one, other)


def test_an_example_that_a_batch_holds_twice_is_visited_twice() -> None:
    """As in a batch drawn with replacement: the visits in the order of the batch, as if each had a batch of its own."""
    course, rng = _course(), torch.Generator().manual_seed(0)
    together, alone = Audit(N, CLASSES), Audit(N, CLASSES)
    for epoch in range(EPOCHS):
        index = torch.randint(N, (40,), generator=rng)
        noise = torch.rand(40, generator=rng)  # as dropout's: the visits of an example differ
        values = {name: v[index] for name, v in _epoch(course, epoch).items()}
        values |= {"norms": values["norms"] * noise, "labels": course["labels"][index]}
        together.update(index, lr=float(RATES[epoch]) * 40, **values)
        for k in range(40):
            alone.update(index[k : k + 1], lr=float(RATES[epoch]), **{n: v[k : k + 1] for n, v in values.items()})
    assert together.compute().times_seen.max() > EPOCHS
    _equal(together.compute(), alone.compute())


def test_reset_forgets_everything() -> None:
    audit = _fed(_course(0))
    audit.reset()
    assert audit.compute().times_seen.sum() == 0
    _feed(audit, _course(1))
    _equal(audit.compute(), _fed(_course(1)).compute())


def _second_half(audit: Audit, course: dict[str, torch.Tensor]) -> Audit:
    for epoch in range(2, EPOCHS):
        audit.update(torch.arange(N), labels=course["labels"], **_epoch(course, epoch))
    return audit


def _epoch(course: dict[str, torch.Tensor], epoch: int) -> dict[str, torch.Tensor]:
    return {name: course[name][epoch] for name in ("losses", "norms", "logits")}


def test_a_saved_state_goes_on_as_if_never_interrupted(tmp_path: Path) -> None:
    course, whole = _course(), Audit(N, CLASSES)
    for epoch in range(2):
        whole.update(torch.arange(N), labels=course["labels"], **_epoch(course, epoch))
    torch.save(whole.state_dict(), tmp_path / "audit.pt")
    state = whole.state_dict()
    _second_half(whole, course)
    again = Audit(N, CLASSES)
    again.load_state_dict(torch.load(tmp_path / "audit.pt", weights_only=True))
    _equal(_second_half(again, course).compute(), whole.compute())
    again.load_state_dict(state)  # the copies in it were left alone by the updates
    assert again.compute().times_seen.tolist() == [2] * N
    with pytest.raises(InputError, match="norms were given in some updates"):
        again.update(torch.arange(N), labels=course["labels"], losses=course["losses"][0], logits=course["logits"][0])


@pytest.mark.parametrize(("n", "n_classes"), [(N + 1, CLASSES), (N, CLASSES + 1), (N, None)])
def test_a_state_of_other_sizes_is_refused(n: int, n_classes: int | None) -> None:
    audit = Audit(n, n_classes)
    found, here = (N, n) if n != N else (CLASSES, n_classes)
    with pytest.raises(InputError, match=f"Audit: the state's n.* is {found}, expected {here}, as here; make it with"):
        audit.load_state_dict(_fed(_course()).state_dict())
    assert audit.compute().times_seen.sum() == 0


def test_a_state_that_lacks_something_is_refused() -> None:
    state = Audit(N, CLASSES).state_dict()
    del state["loss_sum"]
    with pytest.raises(InputError, match="the state has no loss_sum"):
        Audit(N, CLASSES).load_state_dict(state)


@pytest.mark.parametrize(("name", "value"), [("loss", torch.ones(1)), ("labels", 3), ("flipped", torch.ones(2))])
def test_a_state_of_other_shapes_is_refused_and_nothing_loaded(name: str, value: object) -> None:
    """One number would otherwise be spread over all examples."""
    audit = Audit(N, CLASSES, calibrate=0.1)
    audit.plant(torch.arange(N), _course()["labels"])
    state = audit.state_dict()
    again = Audit(N, CLASSES)
    with pytest.raises(InputError, match=f"the state's {name} is .*, expected a tensor of .* and shape"):
        again.load_state_dict(state | {"seen": torch.ones(N, dtype=torch.float64), name: value})
    assert again.compute().times_seen.sum() == 0
    assert again.compute().planted is None


def test_examples_never_seen_come_last_and_are_not_flagged() -> None:
    audit = Audit(3, n_classes=2)
    logits, labels = torch.tensor([[3.0, 0.0]]), torch.tensor([1])
    audit.update(torch.tensor([2]), losses=torch.tensor([0.5]), logits=logits, labels=labels)
    scores = audit.compute()
    assert scores.rank.tolist() == [2, 3, 1]
    assert scores.flagged.tolist() == [False, False, True]
    assert scores.suggested.tolist() == [-1, -1, 0]
    assert scores.mean_loss.isnan().tolist() == [True, True, False]


def test_memory_does_not_grow_with_updates() -> None:
    audit = Audit(N, CLASSES)
    sizes = []
    for _ in range(3):
        course = _course()
        audit.update(torch.arange(N), losses=course["losses"][0], logits=course["logits"][0], labels=course["labels"])
        sizes.append(sum(v.numel() for v in audit.state_dict().values() if isinstance(v, torch.Tensor)))
    assert sizes[0] == sizes[-1] <= N * (CLASSES + 15)


def test_without_classes_there_are_no_suggestions() -> None:
    audit = Audit(2)
    audit.update(torch.tensor([1, 0]), losses=torch.tensor([1.0, 2.0]))
    scores = audit.compute()
    assert scores.flagged is None
    assert scores.suggested is None
    assert scores.mean_norm is None
    assert scores.order().tolist() == [0, 1]


def test_nothing_is_kept_of_the_graph() -> None:
    weight = torch.ones(2, requires_grad=True)
    audit = Audit(2)
    audit.update(torch.arange(2), losses=weight * 2, norms=weight * 3)
    assert not audit.compute().mean_loss.requires_grad
    assert not audit.compute().mean_norm.requires_grad


GOOD = {
    "index": torch.tensor([0, 1]),
    "losses": torch.tensor([1.0, 2.0]),
    "norms": torch.tensor([1.0, 2.0]),
    "logits": torch.zeros(2, 3),
    "labels": torch.tensor([0, 2]),
}
REFUSED = {
    "a position out of range": ({"index": torch.tensor([0, 9])}, "examples 0 to 4"),
    "a negative position": ({"index": torch.tensor([-1, 1])}, "examples 0 to 4"),
    "a position twice, with two labels": ({"index": torch.tensor([1, 1])}, "example 1 has two labels in this batch"),
    "positions that are floats": ({"index": torch.tensor([0.0, 1.0])}, "index holds float32; expected whole numbers"),
    "a mask for positions": ({"index": torch.tensor([True, False])}, "index holds bool; expected whole numbers"),
    "an index that is no tensor": ({"index": "all"}, "index is a str; expected a tensor"),
    "labels that are floats": ({"labels": torch.tensor([0.0, 1.0])}, "labels holds float32; expected whole"),
    "complex losses": ({"losses": torch.ones(2, dtype=torch.complex64)}, "losses holds complex64; expected real"),
    "complex logits": ({"logits": torch.ones(2, 3, dtype=torch.complex64)}, "logits holds complex64; expected real"),
    "a negative norm": ({"norms": torch.tensor([1.0, -2.0])}, "norms: the smallest is -2"),
    "a learning rate of nan": ({"lr": float("nan")}, "lr=nan, expected the learning rate"),
    "a negative learning rate": ({"lr": -0.1}, "lr=-0.1, expected the learning rate"),
    "no learning rate": ({"lr": None}, "lr=None, expected the learning rate"),
    "a learning rate that is text": ({"lr": "0.1"}, "lr='0.1', expected the learning rate"),
    "an index of the wrong shape": ({"index": torch.tensor([[0, 1]])}, r"index has shape \(1, 2\)"),
    "losses of the wrong shape": ({"losses": torch.ones(3)}, r"losses has shape \(3,\)"),
    "norms of the wrong shape": ({"norms": torch.ones(2, 1)}, r"norms has shape \(2, 1\)"),
    "logits of the wrong shape": ({"logits": torch.ones(2, 4)}, r"logits have shape \(2, 4\)"),
    "no labels": ({"labels": None}, "needs logits and labels"),
    "a label out of range": ({"labels": torch.tensor([0, 3])}, "expected 0 to 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    change, message = REFUSED[case]
    audit = Audit(5, 3)
    with pytest.raises(InputError, match=message):
        audit.update(**(GOOD | change))
    assert audit.compute().times_seen.sum() == 0
    assert (audit.compute().given == -1).all()


@pytest.mark.parametrize("name", ["logits", "labels"])
def test_outputs_are_refused_where_nothing_was_said_of_classes(name: str) -> None:
    with pytest.raises(InputError, match=r"made without n_classes and takes no logits and labels; make it with"):
        Audit(5).update(GOOD["index"], losses=GOOD["losses"], **{name: GOOD[name]})


def test_lists_and_arrays_are_taken() -> None:
    audit, other = Audit(5, 3), Audit(5, 3)
    audit.update(**{name: values.numpy() for name, values in GOOD.items()})
    other.update(**{name: values.tolist() for name, values in GOOD.items()})
    _equal(audit.compute(), other.compute())
    assert audit.compute().times_seen.sum() == 2


def test_large_logits_are_finite() -> None:
    """Their sum is not, which is what is looked at first."""
    audit = Audit(5, 3)
    audit.update(**(GOOD | {"logits": torch.tensor([[3e38, 3e38, 0.0], [0.0, 0.0, 1.0]])}))
    assert audit.compute().suggested_probability[:2].tolist() == [0.5, pytest.approx(0.576, abs=1e-3)]


@pytest.mark.parametrize("name", ["losses", "norms", "logits"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_overflows_is_left_out_counted_and_told_once(name: str, value: float, tmp_path: Path) -> None:
    audit = Audit(5, 3)
    bad = GOOD[name].clone()
    bad[1] = value
    with pytest.warns(RowgradWarning, match=rf"example 1: its {name} are not finite. Such visits are left out") as told:
        audit.update(**(GOOD | {name: bad}))
    assert told[0].filename == __file__
    audit.update(**(GOOD | {name: bad}))  # without a further word
    assert audit.compute().times_seen.tolist() == [2, 0, 0, 0, 0]
    assert audit.compute().given.tolist() == [0, -1, -1, -1, -1]
    assert audit.skipped == 2
    torch.save(audit.state_dict(), tmp_path / "audit.pt")
    again = Audit(5, 3)
    again.load_state_dict(torch.load(tmp_path / "audit.pt", weights_only=True))
    assert again.skipped == 2
    again.reset()
    assert again.skipped == 0


def test_a_masked_logit_is_a_probability_of_zero() -> None:
    """Unless it is that of the given label, whose loss is infinite."""
    audit, other = Audit(5, 3), Audit(5, 3)
    audit.update(**(GOOD | {"logits": torch.tensor([[0.0, -torch.inf, 1.0], [1.0, 1.0, 0.0]])}))
    other.update(**(GOOD | {"logits": torch.tensor([[0.0, -1e9, 1.0], [1.0, 1.0, 0.0]])}))
    _equal(audit.compute(), other.compute())
    assert audit.compute().times_seen.sum() == 2
    with pytest.warns(RowgradWarning, match="example 1: its logits are not finite"):
        audit.update(**(GOOD | {"logits": torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, -torch.inf]])}))


@pytest.mark.parametrize(("shape", "flat"), [((2,), "logits"), ((2, 1), "logits[:, 0]")])
def test_of_a_single_logit_it_says_how_to_make_two(shape: tuple[int, ...], flat: str) -> None:
    z = torch.tensor([0.5, -2.0])
    with pytest.raises(InputError, match=re.escape(f"make two: torch.stack([torch.zeros_like({flat}), {flat}], 1)")):
        Audit(5, 2).update(GOOD["index"], losses=z.abs(), logits=z.reshape(shape), labels=torch.tensor([0, 1]))
    pair = torch.stack([torch.zeros_like(z), z], 1)
    torch.testing.assert_close(pair.softmax(1)[:, 1], z.sigmoid())
    with pytest.raises(InputError, match=r"expected \(2, 3\) and \(2,\)$"):  # of three classes there is no such way
        Audit(5, 3).update(GOOD["index"], losses=z.abs(), logits=z, labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("n_micro", [1, 2])
def test_self_influence_is_what_an_examples_own_share_of_the_step_takes_off_its_loss(n_micro: int) -> None:
    """To first order; measured by moving the weights along each example's part of the gradient alone."""
    torch.manual_seed(0)
    model, lr, size = nn.Linear(20, 3).double(), 1e-6, 32
    x, y = torch.randn(size, 20, dtype=torch.float64), torch.randint(3, (size,))
    weights, audit = dict(model.named_parameters()), Audit(size, 3)
    decrease = []
    for index in torch.arange(size).chunk(n_micro):
        logits = model(x[index])
        losses = F.cross_entropy(logits, y[index], reduction="none")
        rows = [torch.autograd.grad(loss, [*weights.values()], retain_graph=True) for loss in losses]
        norms = torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in rows])
        audit.update(index, losses=losses, norms=norms, logits=logits, labels=y[index], lr=lr / n_micro)
        for k, row, loss in zip(index.tolist(), rows, losses, strict=True):
            moved = {name: w - lr * g / size for (name, w), g in zip(weights.items(), row, strict=True)}
            after = F.cross_entropy(torch.func.functional_call(model, moved, (x[k : k + 1],)), y[k : k + 1])
            decrease.append((loss - after).item())
    torch.testing.assert_close(audit.compute().self_influence, torch.tensor(decrease), rtol=1e-4, atol=0)


def test_a_changed_label_is_refused() -> None:
    audit = Audit(5, 3)
    audit.update(**GOOD)
    with pytest.raises(InputError, match="example 1 has another label"):
        audit.update(**(GOOD | {"labels": torch.tensor([0, 1])}))


def test_norms_come_in_every_update_or_in_none() -> None:
    audit = Audit(5, 3)
    audit.update(**GOOD)
    with pytest.raises(InputError, match="norms were given in some updates"):
        audit.update(**(GOOD | {"norms": None}))


@pytest.mark.parametrize("arguments", [(0,), (5, 1), (10.5,), (5, 2.0), ([1, 2],), (True,), (5, True), ("5",)])
def test_sizes_that_cannot_be_audited(arguments: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="needs an example and, for labels, two classes"):
        Audit(*arguments)


def test_sizes_may_be_numpys() -> None:
    audit = Audit(np.int64(5), np.int32(3))
    assert [type(size) for size in (audit.n, audit.n_classes)] == [int, int]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibrate": "0.1"}, "Audit: calibrate='0.1', expected the share of labels"),
        ({"calibrate": True}, "Audit: calibrate=True, expected the share of labels"),
        ({"calibrate": float("nan")}, "Audit: calibrate=nan, expected the share of labels"),
        ({"calibrate": 0.5, "generator": 3}, "Audit: generator=3, expected a torch.Generator"),
    ],
)
def test_options_that_are_something_else(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Audit(5, 2, **arguments)


STATES = {
    "no mapping": (lambda state: None, "Audit: the state is None; load what"),
    "no flips where some are": (lambda s: s | {"flipped": None}, "flipped is None, expected a tensor of int64"),
    "flips where none are": (lambda s: s | {"shifts": None}, r"flipped is a tensor of int64 and shape \(23,\)"),
    "shifts in float": (lambda s: s | {"shifts": s["shifts"].float()}, "shifts is a tensor of float32"),
    "shifts too far": (lambda s: s | {"shifts": s["shifts"] + 4}, "shifts is a .*, from 4 to 7, expected .* 0 to 3"),
    "labels out of range": (lambda s: s | {"labels": torch.full((N,), 99)}, "labels is a .*, from 99 to 99, expected"),
    "nan": (lambda s: s | {"seen": s["seen"] * torch.nan}, "seen is a tensor of float64 .*nan"),
    "a negative sum": (lambda s: s | {"norm_sum": s["norm_sum"] - 100}, "norm_sum is a tensor of float64 .* from -"),
    "complex": (lambda s: s | {"peak": s["peak"].cfloat()}, "peak is a tensor of complex64"),
    "odd norms": (lambda s: s | {"has_norms": "x"}, "has_norms is 'x', expected True, False or None"),
    "odd plants": (lambda s: s | {"has_planted": 2}, "has_planted is 2, expected True or False"),
    "odd count": (lambda s: s | {"skipped": -1}, "skipped is -1, expected a whole number"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_state_that_no_audit_has_is_refused_and_nothing_loaded(case: str) -> None:
    change, message = STATES[case]
    state = _planted(Audit(N, CLASSES, calibrate=0.2)).state_dict()
    audit = _planted(Audit(N, CLASSES, calibrate=0.4))
    before = audit.state_dict()
    with pytest.raises(InputError, match=message):
        audit.load_state_dict(change(state))
    after = audit.state_dict()
    assert all(torch.equal(v, after[k]) if isinstance(v, torch.Tensor) else v == after[k] for k, v in before.items())
    audit.load_state_dict(state)
    assert int(audit.compute().planted.sum()) == round(0.2 * N)


def _planted(audit: Audit) -> Audit:
    course = _course()
    audit.update(torch.arange(N), labels=audit.plant(torch.arange(N), course["labels"]), **_epoch(course, 0))
    return audit


def test_an_audit_without_flips_goes_into_one_with_some() -> None:
    audit = Audit(N, CLASSES, calibrate=0.2)
    audit.load_state_dict(_fed(_course()).state_dict())
    _equal(audit.compute(), _fed(_course()).compute())
    assert audit.plant([0, 1], [2, 3]) == [2, 3]


@pytest.mark.parametrize("kind", [list, np.asarray])
def test_labels_to_plant_may_be_lists_and_arrays(kind: Callable) -> None:
    labels = _course()["labels"]
    audit = Audit(N, CLASSES, calibrate=0.2)
    planted = audit.plant(kind(range(N)), kind(labels.tolist()))
    assert torch.equal(planted, audit.plant(torch.arange(N), labels))
    assert int((planted != labels).sum()) == round(0.2 * N)
