"""The data sets that come with scikit-learn, by name: nothing is downloaded."""

import numpy as np
import polars as pl
from sklearn import datasets

from rowgrad.data.raw import Raw

BUNDLED = {
    "digits": datasets.load_digits,
    "breast_cancer": datasets.load_breast_cancer,
    "wine": datasets.load_wine,
    "iris": datasets.load_iris,
    "diabetes": datasets.load_diabetes,
}
TARGETS = {
    "digits": "digit",
    "breast_cancer": "diagnosis",
    "wine": "cultivar",
    "iris": "species",
    "diabetes": "progression",
}


def read_bundled(name: str) -> Raw:
    """A data set of scikit-learn as columns; digits as images of 8 x 8 pixels."""
    loaded = BUNDLED[name]()
    target = pl.Series(TARGETS[name], _labels(loaded))
    rows = np.arange(len(target))
    if name == "digits":
        return Raw(name, target.to_frame(), "row", rows, images=loaded.images)
    columns = {feature: loaded.data[:, k] for k, feature in enumerate(loaded.feature_names)}
    return Raw(name, pl.DataFrame(columns).with_columns(target), "row", rows)


def _labels(loaded) -> np.ndarray:
    names = getattr(loaded, "target_names", None)
    if names is None or np.issubdtype(np.asarray(names).dtype, np.integer):
        return loaded.target
    return np.asarray(names, dtype=str)[loaded.target]
