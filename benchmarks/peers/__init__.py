"""Other people's implementations of the same result, one file each, run beside ours where they are installed.

A peer's file has `NAME`, the `MODULE` to import, `OPS`, the ops it has something for, and `provide(case, device)`: a
Provider, or in words why it has none.
"""

from __future__ import annotations

import importlib
import importlib.util

from benchmarks.cases import Case, Provider

PEERS = (
    "linear_cross_entropy",
    "liger",
    "cut_cross_entropy",
    "lstsq",
    "cov",
    "sklearn",
    "incremental_pca",
    "himalaya",
    "peft_lora",
)


def peers_of(case: Case, device: str) -> tuple[dict[str, Provider], dict[str, str]]:
    """Providers by name, and the reasons for leaving out other peers that have something for this op."""
    found, reasons = {}, {}
    for name in PEERS:
        peer = importlib.import_module(f"benchmarks.peers.{name}")
        if case.op not in peer.OPS:
            continue
        if importlib.util.find_spec(peer.MODULE) is None:
            reasons[peer.NAME] = "is not installed"
        else:
            made = peer.provide(case, device)
            (reasons if isinstance(made, str) else found)[peer.NAME] = made
    return found, reasons
