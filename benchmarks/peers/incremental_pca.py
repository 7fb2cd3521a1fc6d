"""scikit-learn's IncrementalPCA, which streams as `StreamingPCA` does but keeps k components from batch to batch."""

from __future__ import annotations

from benchmarks.cases import Case, Provider
from benchmarks.ops.pca import BATCHES
from benchmarks.peers.sklearn import components

NAME, MODULE, OPS = "IncrementalPCA", "sklearn", ("pca",)


def provide(case: Case, device: str) -> Provider | str:
    """An approximation: timed with the error it has."""
    if device != "cpu":
        return "runs on CPUs alone"
    from sklearn.decomposition import IncrementalPCA

    def prepare(x):
        def step():
            pca = IncrementalPCA(case.shape["k"])
            for part in x.numpy().reshape(BATCHES, -1, x.shape[1]):
                pca.partial_fit(part)
            return pca

        return step

    return Provider(prepare, components, approximate=True)
