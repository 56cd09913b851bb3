"""Orders and maps in which like things stand together."""

from __future__ import annotations

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import pdist

# Rows that differ: fewer make no map; for fewer than the second number t-SNE is computed exactly.
_LEAST_DIFFERENT, _FEW = 8, 200


def cluster_order(rows: np.ndarray) -> np.ndarray:
    """An order of (R, D) rows in which like ones stand together: leaves of average-linkage clustering by Euclidean distance, in
    scipy's optimal order."""
    if len(rows) < 3:
        return np.arange(len(rows))
    distances = pdist(np.asarray(rows, dtype=np.float64))
    return leaves_list(optimal_leaf_ordering(linkage(distances, "average"), distances))


def pattern_cosines(patterns: np.ndarray) -> np.ndarray:
    """(m, m) cosines of (m, d) patterns."""
    unit = patterns / np.maximum(np.linalg.norm(patterns, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


def embed(content: np.ndarray, *, seed: int = 0) -> dict[str, np.ndarray]:
    """(P, d) content in two dimensions: {"PCA": (P, 2), "t-SNE": (P, 2)}; the same seed gives the same places, and equal rows
    have the same place. Empty if fewer than eight rows differ: a static table of few queries has no map."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    # Equal rows are embedded once: t-SNE's tree does not survive heaps of points in one place.
    scale = float(np.abs(content).max(initial=0)) or 1.0
    values = content.astype(np.float64)
    _, first, inverse = np.unique((values / scale).round(5), axis=0, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    values = values[first]
    if len(values) < _LEAST_DIFFERENT:
        return {}
    width = min(30, *values.shape)
    reduced = PCA(width, svd_solver="full").fit_transform(values)
    tsne = TSNE(
        2,
        perplexity=min(30.0, (len(values) - 1) / 3),
        init="pca",
        learning_rate="auto",
        random_state=seed,
        method="exact" if len(values) < _FEW else "barnes_hut",
    )
    return {"PCA": reduced[inverse, :2], "t-SNE": np.asarray(tsne.fit_transform(reduced))[inverse]}
