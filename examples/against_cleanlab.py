"""Wrong labels found by an audit of one training, and by cleanlab's cross-validation with the same network.

    pip install cleanlab
    python examples/against_cleanlab.py [--seeds 3]

changes 10% of the labels of scikit-learn's digits and breast_cancer and of a text task (sentences from the docstrings
of Python's standard library, labelled by package, as bags of words), ranks the examples by how wrong they look, and
prints average precision and seconds, over several flips and starts (about three minutes on one thread). All see the
same data; the networks have the shape, optimizer, dropout and epochs of `rowgrad audit`.
"""

import argparse
import ast
import re
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.data.corrupt import flip_labels
from rowgrad.training.mlp import adam, mlp
from rowgrad.training.settings import Settings
from rowgrad.uses.planted import average_precision

if __package__:
    from examples.robust_training import shown
else:
    from robust_training import shown

FLIP = 0.1
PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "tkinter", "unittest", "xml")
Data = tuple[Tensor, Tensor]  # features (N, d) and labels (N,)
Ranking = Callable[[Tensor, Tensor, int, Settings], Tensor]  # features, labels, seed -> suspicion (N,)


def standardized(x: Tensor, y: Tensor) -> Data:
    return ((x - x.mean(0)) / x.std(0).clamp_min(1e-6)).float(), y


def digits() -> Data:
    x, y = load_digits(return_X_y=True)
    return standardized(torch.as_tensor(x), torch.as_tensor(y))


def breast_cancer() -> Data:
    x, y = load_breast_cancer(return_X_y=True)
    return standardized(torch.as_tensor(x), torch.as_tensor(y))


def sentences() -> list[tuple[str, str]]:
    """Of the docstrings of some packages: (sentence, package), each sentence once, of six words or more."""
    library, found = Path(sysconfig.get_paths()["stdlib"]), {}
    for package in PACKAGES:
        for path in sorted((library / package).rglob("*.py")):
            if "test" in path.relative_to(library / package).parts:
                continue
            for text in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
                for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", text):
                    if len(re.findall(r"[A-Za-z]{2,}", sentence)) >= 6:
                        found.setdefault(" ".join(sentence.split()), package)
    return list(found.items())


def docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def text() -> Data:
    """Sentences as bags of words; each has length 1, times the root of the number of words to suit the network."""
    pairs = sentences()
    bags = TfidfVectorizer(min_df=3, sublinear_tf=True).fit_transform([sentence for sentence, _ in pairs])
    x = torch.as_tensor(bags.toarray()).float()
    return x * x.shape[1] ** 0.5, torch.tensor([PACKAGES.index(package) for _, package in pairs])


def train(
    x: Tensor, y: Tensor, n_classes: int, seed: int, settings: Settings, audit: rg.Audit | None = None
) -> nn.Module:
    """As `rowgrad audit` does, without gradient norms."""
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = mlp(x.shape[1], settings.hidden, n_classes, settings.dropout)
        optimizer = adam(model, settings.lr)
        for _ in range(settings.epochs_for(len(y))):
            for index in torch.randperm(len(y), generator=rng).split(settings.batch_size_for(len(y))):
                logits = model(x[index])
                losses = F.cross_entropy(logits, y[index], reduction="none")
                if audit is not None:
                    audit.update(index, losses=losses, logits=logits, labels=y[index])
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
    return model.eval()


def audited(x: Tensor, y: Tensor, seed: int, settings: Settings) -> Tensor:
    audit = rg.Audit(len(y), int(y.max()) + 1)
    train(x, y, int(y.max()) + 1, seed, settings, audit)
    return audit.compute().mean_loss


@torch.no_grad()
def at_the_end(x: Tensor, y: Tensor, seed: int, settings: Settings) -> Tensor:
    with torch.enable_grad():
        model = train(x, y, int(y.max()) + 1, seed, settings)
    return F.cross_entropy(model(x), y, reduction="none")


@torch.no_grad()
def cleanlab_network(x: Tensor, y: Tensor, seed: int, settings: Settings) -> Tensor:
    n_classes = int(y.max()) + 1
    probabilities = torch.zeros(len(y), n_classes)
    for rest, fold in StratifiedKFold(5, shuffle=True, random_state=seed).split(x, y):
        with torch.enable_grad():
            model = train(x[rest], y[rest], n_classes, seed, settings)
        probabilities[fold] = model(x[fold]).softmax(1)
    return cleanlab_scores(y, probabilities)


def cleanlab_logistic(x: Tensor, y: Tensor, seed: int, settings: Settings) -> Tensor:
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    model = LogisticRegression(max_iter=1000)
    found = cross_val_predict(model, x.numpy(), y.numpy(), cv=folds, method="predict_proba")
    return cleanlab_scores(y, torch.as_tensor(found))


def cleanlab_scores(y: Tensor, probabilities: Tensor) -> Tensor:
    from cleanlab.rank import get_label_quality_scores  # pyright: ignore[reportMissingImports]

    return -torch.as_tensor(get_label_quality_scores(y.numpy(), probabilities.numpy()))


DATA: dict[str, Callable[[], Data]] = {"digits": digits, "breast_cancer": breast_cancer, "text": text}
RANKINGS: dict[str, Ranking] = {
    "audit: mean loss of one training": audited,
    "the same training: loss at the end": at_the_end,
    "cleanlab: 5 folds of the same network": cleanlab_network,
    "cleanlab: 5 folds of logistic regression": cleanlab_logistic,
}


def measured(ranking: Ranking, x: Tensor, y: Tensor, seed: int, settings: Settings) -> tuple[float, float]:
    """Average precision for 10% changed labels, and seconds."""
    given, changed = flip_labels(y, int(y.max()) + 1, FLIP, torch.Generator().manual_seed(seed))
    start = time.perf_counter()
    suspicion = ranking(x, given, seed, settings)
    seconds = time.perf_counter() - start
    return average_precision(changed[suspicion.argsort(descending=True, stable=True)]), seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", nargs="+", choices=DATA, default=[*DATA])
    parser.add_argument("--epochs", type=int, help="of the networks; default 40, as `rowgrad audit`")
    options = parser.parse_args(arguments)
    try:
        import cleanlab  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise SystemExit("this comparison needs cleanlab: pip install cleanlab") from None
    print(
        f"average precision for {FLIP:.0%} changed labels, mean +- standard error of {options.seeds} seeds [seconds]; "
    )
    print(f"cleanlab {cleanlab.__version__}, torch {torch.__version__}\n")
    settings = Settings(epochs=options.epochs)
    audited(torch.randn(64, 4), torch.arange(64) % 2, 0, Settings(epochs=1))  # what a first training loads is not timed
    sets = {name: DATA[name]() for name in options.data}
    heads = [f"{name}, {len(y)} x {x.shape[1]}, {int(y.max()) + 1} classes" for name, (x, y) in sets.items()]
    print("| ranked by | " + " | ".join(heads) + " |")
    print("|---" * (1 + len(heads)) + "|")
    for name, ranking in RANKINGS.items():
        cells = []
        for x, y in sets.values():
            runs = [measured(ranking, x, y, seed, settings) for seed in range(options.seeds)]
            precisions, seconds = zip(*runs, strict=True)
            cells.append(f"{shown(precisions)} [{sum(seconds) / len(runs):.1f}]")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
