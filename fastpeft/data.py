"""What the training texts say about an adapter before it is trained: how many kinds of text there are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

RULES = ("silhouette", "elbow")


@dataclass(frozen=True)
class Suggestion:
    """heads: how many HydraLoRA should have.   silhouette, inertia: by number of clusters, mean silhouette coefficient (in [-1, 1], higher is
    better) and sum of squared distances to the nearest centre."""

    heads: int
    silhouette: dict[int, float]
    inertia: dict[int, float]


def suggest_heads(
    texts: Sequence[str],
    *,
    most: int = 10,
    rule: str = "silhouette",
    seed: int = 0,
    sample: int = 20_000,
    features: int = 10_000,
    dimensions: int | None = 100,
) -> Suggestion:
    """How many heads HydraLoRA should have for these training texts: the best number of k-means clusters of their TF-IDF features.

    The clusters are thrown away: HydraLoRA's router learns by itself which head a token uses.
    most: largest number tried; the smallest is 2.   rule: "silhouette": the number of the highest mean coefficient; "elbow": the one whose inertia lies
        farthest below the line from the first to the last.
    sample: texts looked at, drawn with `seed`.   features: words kept.   dimensions: of the truncated SVD before k-means; None for none.

    Needs scikit-learn. ValueError on other arguments, fewer than four different texts, and texts without words.
    Source: HydraLoRA, arXiv 2404.19245, and its authors' answers; the rule and all numbers are ours (there is no released code for this).
    """
    if rule not in RULES:
        raise ValueError(f"suggest_heads: rule={rule!r}; it must be one of {', '.join(map(repr, RULES))}.")
    if isinstance(texts, str) or any(not isinstance(t, str) for t in texts):
        raise ValueError("suggest_heads: texts must be a sequence of strings.")
    for name, value, low in (("most", most, 2), ("sample", sample, 4), ("features", features, 2), ("dimensions", 1 if dimensions is None else dimensions, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"suggest_heads: {name}={value!r}; it must be a whole number of at least {low}.")
    different = sorted(set(texts))
    if len(different) < 4:
        raise ValueError(f"suggest_heads: {len(different)} different texts; clusters need at least 4.")
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import silhouette_score

    chosen = random.Random(seed).sample(different, min(sample, len(different)))
    try:
        points = TfidfVectorizer(sublinear_tf=True, max_features=features).fit_transform(chosen)
    except ValueError as e:
        raise ValueError(f"suggest_heads: the texts have no words to tell them apart by ({e}).") from None
    if dimensions is not None and dimensions < min(points.shape):
        points = TruncatedSVD(dimensions, random_state=seed).fit_transform(points)
    silhouette: dict[int, float] = {}
    inertia: dict[int, float] = {}
    for k in range(2, min(most, len(chosen) - 1) + 1):
        found = KMeans(k, n_init=5, random_state=seed).fit(points)
        if len(set(found.labels_)) < k:
            break  # fewer different points than clusters
        silhouette[k] = float(silhouette_score(points, found.labels_, sample_size=min(len(chosen), 5_000), random_state=seed))
        inertia[k] = float(found.inertia_)
    if not silhouette:
        raise ValueError("suggest_heads: the texts are all alike in their words; there is nothing to cluster.")
    best = max(silhouette, key=lambda k: silhouette[k]) if rule == "silhouette" else _elbow(inertia)
    return Suggestion(best, silhouette, inertia)


def _elbow(inertia: dict[int, float]) -> int:
    first, last = min(inertia), max(inertia)
    if first == last:
        return first
    slope = (inertia[last] - inertia[first]) / (last - first)
    return max(inertia, key=lambda k: inertia[first] + slope * (k - first) - inertia[k])
