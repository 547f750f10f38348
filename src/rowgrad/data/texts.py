"""Texts as bags of words: which columns are texts, which words count, and the numbers a text becomes.

Note [the numbers of a text]
    One for each word that counts: (1 + ln n) * idf, where the text holds the word n > 0 times, and 0 where it does not;
    then all of a text's numbers are divided by the root of the sum of their squares. idf = 1 + ln((1 + N) / (1 + N_w)),
    for N texts of which N_w hold the word (Salton and Buckley 1988, in scikit-learn's form). Words are runs of two or
    more letters or digits, in small letters.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.preprocessing import normalize

SENTENCE = 3  # words from which a value reads as a sentence
LEAST_TEXTS = 3  # that hold a word, for it to count
MAX_WORDS = 2000  # of a column
MAX_ENTRIES = 100_000_000  # examples times words; training takes some 20 bytes of memory for each
LEAST_ROOM = 100  # words below which a bag is not worth having


def are_sentences(texts: pl.Series) -> bool:
    """Whether more than half of the values that are there have three words or more; one with digits alone is none."""
    words = texts.drop_nulls().str.count_matches(r"\S*\p{L}{2}\S*")
    return 2 * int((words >= SENTENCE).sum()) > len(words)


def choose_words(texts: Sequence[str], most: int) -> tuple[tuple[str, ...], tuple[float, ...], int]:
    """Words that count, in order of the alphabet, their idf, and how many would count if there were no limit.

    Of those that at least three texts hold, the `most` that the most texts hold.
    """
    vectorizer = CountVectorizer(binary=True)
    try:
        bags: Any = vectorizer.fit_transform(texts)
    except ValueError:  # no text holds a word
        return (), (), 0
    n_texts = np.bincount(bags.indices, minlength=bags.shape[1])
    known = np.flatnonzero(n_texts >= LEAST_TEXTS)
    chosen = np.sort(known[np.argsort(-n_texts[known], kind="stable")[:most]])
    weights = 1 + np.log((1 + len(texts)) / (1 + n_texts[chosen]))
    return tuple(vectorizer.get_feature_names_out()[chosen].tolist()), tuple(weights.tolist()), len(known)


def bags_of(texts: Sequence[str], words: Sequence[str], weights: Sequence[float]) -> np.ndarray:
    """The numbers of texts, float32, shape (N, words); other words in them count nothing."""
    counts: Any = CountVectorizer(vocabulary=words).transform(texts)
    counts.data = (1 + np.log(counts.data)) * np.asarray(weights)[counts.indices]
    return normalize(counts, copy=False).astype(np.float32).toarray()
