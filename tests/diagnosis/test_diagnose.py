"""`rowgrad.diagnose` as a whole: what it reads, what it leaves alone, what it returns."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from tests.cases import CASES
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.errors import FreedGraphError, NoGraphError, NotAVectorError, ParameterError

F64 = torch.float64


class Net(nn.Module):
    """BatchNorm and dropout, and a rectifier that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(F.relu(self.norm(self.first(x))), 0.1))


def losses_and_model() -> tuple[Tensor, nn.Module]:
    model = Net().double()
    return F.cross_entropy(model(torch.randn(9, 4, dtype=F64)), torch.randint(3, (9,)), reduction="none"), model


def test_it_leaves_everything_as_it_was_and_backward_works_afterwards(leaves_nothing_behind) -> None:
    losses, model = losses_and_model()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    expected = torch.autograd.grad(losses.mean(), list(model.parameters()), retain_graph=True)
    with leaves_nothing_behind(model, losses):
        rg.diagnose(losses, model, initial=True, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    losses.mean().backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g + 1, rtol=0, atol=1e-15)


def test_no_hook_runs() -> None:
    losses, model = losses_and_model()
    ran = []
    model.first.weight.register_post_accumulate_grad_hook(lambda p: ran.append(p))
    model.first.register_full_backward_hook(lambda *a: ran.append(a))
    model.register_forward_hook(lambda *a: ran.append(a))
    rg.diagnose(losses, model)
    assert not ran


@pytest.mark.parametrize("name", CASES)
def test_every_model_of_the_table_can_be_diagnosed(name: str, leaves_nothing_behind) -> None:
    setup = CASES[name].build()
    losses = setup.losses()
    with leaves_nothing_behind(setup.model, losses):
        found = rg.diagnose(losses, setup.params)
    assert not found.of("not finite")
    expected = torch.autograd.grad(losses.mean(), list(setup.params.values()), allow_unused=True)
    gradients = dict(zip(setup.params, expected, strict=True))
    for point in found.curves:
        weights = point.layer.weights
        size = sum(float(gradients[w].to_dense().norm()) ** 2 for w in weights if gradients[w] is not None) ** 0.5
        norm = sum(float(setup.params[w].detach().norm()) ** 2 for w in weights) ** 0.5
        assert point.gradient == pytest.approx(size / norm)


def test_the_curves_are_sizes_of_inputs_cotangents_and_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    x = torch.randn(9, 4, dtype=F64)
    hidden = model[0](x)
    out = model[2](hidden.relu())
    losses = out.square().sum(1)
    found = rg.diagnose(losses, model)
    z = torch.autograd.grad(losses.mean(), [hidden, out, model[0].weight, model[2].weight])
    first, last = found.curves
    assert (first.layer.name, last.layer.name) == ("0", "2")
    assert first.activation == pytest.approx(float(x.square().mean().sqrt()))
    assert last.activation == pytest.approx(float(hidden.detach().relu().square().mean().sqrt()))
    assert (first.cotangent, last.cotangent) == pytest.approx((float(z[0].norm()), float(z[1].norm())))
    assert first.gradient == pytest.approx(float(z[2].norm() / model[0].weight.detach().norm()))
    assert last.gradient == pytest.approx(float(z[3].norm() / model[2].weight.detach().norm()))


def test_a_mean_and_its_losses_are_the_same() -> None:
    losses, model = losses_and_model()
    a, b = rg.diagnose(losses, model), rg.diagnose(losses.mean(), model)
    assert [p.cotangent for p in a.curves] == pytest.approx([p.cotangent for p in b.curves])


def test_trace_gives_exact_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))).double()
    with rg.trace(model) as scopes:
        losses = model(torch.randn(9, 4, dtype=F64)).sum(1)
    finding = rg.diagnose(losses, model, trace=scopes).of("mixed")[0]
    assert finding.where == "1.1: native_batch_norm"


def test_limits_can_be_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    losses = model(torch.randn(1, 4, dtype=F64)).square().sum(1)
    assert not rg.diagnose(losses, model).of("dead")
    assert rg.diagnose(losses, model, limits=rg.Limits(dead=0.01)).of("dead")[0].limit == 0.01


def test_what_it_says_as_text_and_as_plain_values() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        model[0].weight *= 1e3
    found = rg.diagnose(model(torch.randn(9, 4, dtype=F64)).squeeze(1), model)
    text = str(found)
    assert text.startswith("diagnosis of 2 layers: ")
    assert "saturated at after 0: tanh" in text
    assert "not looked at: drift (needs earlier=" in text
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["ok"] is False
    assert {f["kind"] for f in plain["findings"]} >= {"saturated"}
    assert plain["curves"][0]["layer"] == "0"


def test_an_empty_batch_and_one_of_one_have_nothing_wrong() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    for n in (0, 1):
        losses = F.cross_entropy(
            model(torch.randn(n, 4, dtype=F64)), torch.zeros(n, dtype=torch.long), reduction="none"
        )
        assert rg.diagnose(losses, model, initial=True).ok


def test_errors_say_what_was_found() -> None:
    losses, model = losses_and_model()
    with pytest.raises(NotAVectorError, match=r"losses has shape \(9, 1\)"):
        rg.diagnose(losses.unsqueeze(1), model)
    with pytest.raises(NotAVectorError, match="losses is a float"):
        rg.diagnose(1.0, model)
    with pytest.raises(NoGraphError):
        rg.diagnose(losses.detach(), model)
    with pytest.raises(NoGraphError, match="none of the 6 parameters is in the graph"):
        rg.diagnose(losses, Net().double())
    with pytest.raises(ParameterError):
        rg.diagnose(losses, model.requires_grad_(False))


def test_a_freed_graph_is_refused() -> None:
    losses, model = losses_and_model()
    losses.mean().backward()
    with pytest.raises(FreedGraphError):
        rg.diagnose(losses, model)
