"""A two-layer softmax network by batch gradient descent (CS 349-02, 2017, algorithm 1 and eqs. 1 to 5).

python examples/two_layer_softmax.py [digits | iris | wine | breast_cancer]
"""

import sys

import torch
from sklearn import datasets, model_selection, preprocessing
from torch import Tensor

import rowgrad as rg


def scores(w: dict[str, Tensor], x: Tensor) -> Tensor:
    return (x @ w["W1"] + w["b1"]).relu() @ w["W2"] + w["b2"]  # s2, by eqs. 2 to 4


def train(w: dict[str, Tensor], x: Tensor, y: Tensor, *, eta: float, alpha: float, maxiter: int) -> None:
    for _ in range(maxiter):
        losses = torch.nn.functional.cross_entropy(scores(w, x), y, reduction="none")  # -log softmax(s2)[y]: eq. 5
        gradient = rg.jacobian(losses, w).weighted_sum(1 / len(x))  # lines 5 to 14: the sum of the rows, over N
        with torch.no_grad():
            for name, p in w.items():  # lines 15 to 19: alpha W for the weights, not for the biases
                p -= eta * (gradient[name] + alpha * p if name.startswith("W") else gradient[name])


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "digits"
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    x, y = torch.tensor(preprocessing.scale(x)), torch.tensor(y)
    x, x_test, y, y_test = model_selection.train_test_split(x, y, test_size=0.3, random_state=0, stratify=y)
    D, H, C = x.shape[1], 32, int(y.max()) + 1
    torch.manual_seed(0)
    w = {"W1": 0.1 * torch.randn(D, H), "b1": torch.zeros(H), "W2": 0.1 * torch.randn(H, C), "b2": torch.zeros(C)}
    w = {name: p.double().requires_grad_() for name, p in w.items()}  # lines 1 to 3
    train(w, x, y, eta=0.5, alpha=1e-3, maxiter=300)
    print(f"right on {(scores(w, x_test).argmax(1) == y_test).double().mean():.1%} of {len(y_test)} new points")
