"""docs/recipes.md runs as it stands, and gives what the slow way gives."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
NOT_OURS = [  # of the packages: their own deprecations and advice
    "ignore:.*treespec.*:",
    "ignore:The '.*' does not have many workers:",
    "ignore:.*pin_memory.*:UserWarning",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
]


def run(position: int) -> dict[str, Any]:
    """The names after the block at this position, which follows the first."""
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        for block in (BLOCKS[0], BLOCKS[position]):
            exec(compile(block, PAGE.name, "exec"), names)
    return names


def rows(losses: Tensor, model: nn.Module) -> Tensor:
    """One backward pass per loss."""
    parameters = list(model.parameters())
    return torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]) for loss in losses]
    )


def clipped_mean(rows: Tensor, max_norm: float = 1.0) -> Tensor:
    return (rows * (max_norm / rows.norm(dim=1, keepdim=True)).clamp(max=1)).mean(0)


def flat_weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_page_has_a_block_for_each_recipe() -> None:
    assert len(BLOCKS) == 1 + PAGE.read_text(encoding="utf-8").count("\n## ")


def test_influence_is_the_sum_over_checkpoints_of_dot_products() -> None:
    names = run(1)
    expected = torch.zeros(64, 10)
    for weights in names["checkpoints"]:
        names["model"].load_state_dict(weights)
        train, test = (
            rows(names["losses_of"](names[x], names[y]), names["model"]) for x, y in (("x", "y"), ("x_test", "y_test"))
        )
        expected += 0.1 / 64 * train @ test.T
    torch.testing.assert_close(names["influence"], expected, rtol=1e-4, atol=1e-6)
    assert names["helped_most"].tolist() == expected[:, 0].topk(3).indices.tolist()


def test_the_help_to_a_test_set_is_the_sum_of_influences() -> None:
    names = run(2)
    train, test = (
        rows(names["losses_of"](names[f"x{which}"], names[f"y{which}"]), names["model"]) for which in ("", "_test")
    )
    torch.testing.assert_close(names["helped"], 0.1 / 64 * (train @ test.T).sum(1))
    torch.testing.assert_close(names["losses"], names["losses_of"](names["x"], names["y"]).detach())


def test_the_kernel_is_that_of_the_outputs() -> None:
    names = run(3)
    model, x = names["model"], names["x"]
    jacobian = torch.stack([rows(model(x)[:, k], model) for k in range(3)])
    torch.testing.assert_close(names["kernel"], torch.einsum("kip,ljp->klij", jacobian, jacobian), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(names["trace_kernel"], torch.einsum("kip,kjp->ij", jacobian, jacobian))
    top = names["direction"]
    assert torch.linalg.vector_norm(names["trace_kernel"] @ top) == pytest.approx(
        float(torch.linalg.matrix_norm(names["trace_kernel"], 2)), rel=1e-4
    )


def test_the_weights_of_the_tasks_give_the_shortest_vector() -> None:
    names = run(4)
    a, b = names["flat"]
    share = ((b - a) @ b / (a - b).square().sum()).clamp(0, 1)
    torch.testing.assert_close(names["weights"], torch.stack([share, 1 - share]), rtol=1e-4, atol=1e-5)
    shortest = share * a + (1 - share) * b
    assert min(float(a @ shortest), float(b @ shortest)) >= float(shortest @ shortest) * (1 - 1e-4)
    found = torch.cat([p.grad.flatten() for p in names["trunk"].parameters()])
    torch.testing.assert_close(found, shortest, rtol=1e-4, atol=1e-6)


def least_by_program(gram: Tensor) -> float:
    """The least w @ gram @ w over weights that add up to 1, by a general solver."""
    n, matrix = len(gram), gram.numpy()
    return minimize(
        lambda w: w @ matrix @ w,
        [1 / n] * n,
        jac=lambda w: 2 * matrix @ w,
        bounds=[(0, 1)] * n,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-15, "maxiter": 1000},
    ).fun


@pytest.mark.parametrize("n_tasks", [2, 3, 5, 10])
@pytest.mark.parametrize("length", [6, 40])
def test_the_shortest_vector_is_that_of_a_quadratic_program(n_tasks: int, length: int) -> None:
    """And what says so by itself: no gradient has a smaller product with it than its own square."""
    shortest = run(4)["shortest"]
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        pulls = torch.rand(n_tasks, 1, generator=rng, dtype=torch.float64) * 3
        flat = torch.randn(n_tasks, length, generator=rng, dtype=torch.float64) * pulls + 0.3
        gram = flat @ flat.T
        weights = shortest(gram)
        assert float(weights.min()) >= 0
        assert float(weights.sum()) == pytest.approx(1, rel=1e-12)
        found, products = float(weights @ gram @ weights), gram @ weights
        assert float(products.min()) >= found - 1e-9 * float(gram.max())
        assert found <= least_by_program(gram) + 1e-9 * float(gram.max())


@pytest.mark.parametrize("rows", [torch.zeros(3, 4), torch.ones(3, 4), torch.eye(3) * 1e-12, torch.eye(3) * 1e12])
def test_equal_and_vanishing_gradients_have_weights_too(rows: Tensor) -> None:
    weights = run(4)["shortest"](rows @ rows.T)
    assert float(weights.min()) >= 0
    assert float(weights.sum()) == pytest.approx(1, rel=1e-6)
    if rows[0, 1] == 0 and rows[0, 0] > 0:
        torch.testing.assert_close(weights, torch.full((3,), 1 / 3))


def test_a_step_of_the_language_model_is_that_of_its_clipped_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: Any, **options: Any) -> Any:
        seen.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]))
        return step(self, *args, **options)

    starts: list[nn.Module] = []
    make = torch.optim.AdamW.__init__

    def started(self: torch.optim.AdamW, parameters: Any, **options: Any) -> None:
        parameters = list(parameters)
        starts.append(nn.ParameterList([p.detach().clone() for p in parameters]))
        make(self, parameters, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    monkeypatch.setattr(torch.optim.AdamW, "__init__", started)
    names = run(5)
    assert len(seen) == 2
    model = names["language_model"]
    with torch.no_grad():
        for parameter, start in zip(model.parameters(), starts[0], strict=True):
            parameter.copy_(start)
    expected = torch.zeros(())
    for ids, mask in zip(names["tokens"][:2], names["real"][:2], strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            token_losses = F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
        losses = (token_losses * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)
        expected = expected + clipped_mean(rows(losses, model), 0.5) / 2
    torch.testing.assert_close(seen[0], expected, rtol=0.05, atol=2e-4)  # bfloat16


@pytest.mark.filterwarnings(*NOT_OURS)
def test_the_trainer_takes_clipped_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(6)
    steps = names["Trainer"], names["TrainingArguments"]
    bert, sentences = names["bert"].eval(), names["sentences"][:16]
    monkeypatch.setattr(bert, "train", lambda mode=True: bert)  # without dropout, to compare
    slow = copy.deepcopy(bert)
    options = steps[1](
        output_dir="again", max_steps=2, per_device_train_batch_size=8, gradient_accumulation_steps=2, optim="sgd",
        learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    steps[0](bert, options, train_dataset=sentences, compute_loss_func=names["clipped"]).train()
    ids = torch.stack([s["input_ids"] for s in sentences])
    labels = torch.stack([s["labels"] for s in sentences])
    for _ in range(2):
        gradient = clipped_mean(rows(F.cross_entropy(slow(ids).logits, labels, reduction="none"), slow))
        parts = gradient.split([p.numel() for p in slow.parameters()])
        with torch.no_grad():
            for parameter, part in zip(slow.parameters(), parts, strict=True):
                parameter -= 0.5 * part.reshape(parameter.shape)
    torch.testing.assert_close(flat_weights(bert), flat_weights(slow), rtol=1e-4, atol=1e-5)
    found = names["trainer"].evaluate(sentences)["eval_loss"]
    with torch.no_grad():
        expected = F.cross_entropy(bert(ids).logits, labels)
    assert found == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.filterwarnings(*NOT_OURS)
def test_lightning_takes_clipped_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(7)
    module = names["Classifier"]()
    slow = copy.deepcopy(module.net)
    x, y = names["x"][:16], names["y"][:16]
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=16))
    for _ in range(3):
        gradient = clipped_mean(rows(F.cross_entropy(slow(x), y, reduction="none"), slow))
        with torch.no_grad():
            for p, part in zip(slow.parameters(), gradient.split([p.numel() for p in slow.parameters()]), strict=True):
                p -= 0.1 * part.reshape(p.shape)
    torch.testing.assert_close(flat_weights(module.net), flat_weights(slow), rtol=1e-4, atol=1e-6)
    assert "largest_norm" in trainer.logged_metrics
