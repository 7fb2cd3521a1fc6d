"""Seconds of processor time that a bridge of 128k to 152k tokens takes, on one core: python -m benchmarks.bridge_sizes

Vocabularies of random merges; text of random tokens. The MB/s of counting leave out the tokenizers' own time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from chassis.bridge import Bridge
from chassis.bridge.counting import BATCH, count
from chassis.testbed.tokenizers import synthetic_bpe
from chassis.text.token_bytes import TokenBytes

SIZES = 128_000, 152_000
PREVIOUS = 1000
TEXTS, TOKENS = 300, 2000


def seconds(run: Callable[[], object]) -> tuple[float, object]:
    started = time.process_time()
    result = run()
    return time.process_time() - started, result


def main() -> None:
    expert, base = (TokenBytes.from_tokenizer(synthetic_bpe(n, seed)) for seed, n in enumerate(SIZES))
    took, bridge = seconds(lambda: Bridge.build(expert, base, "canonical"))
    print(f"canonical build {took:.1f} s")
    took, mask = seconds(lambda: bridge.mask)
    print(f"canonical mask, set-up {took:.1f} s")
    rng = np.random.default_rng(0)
    previous = rng.choice(np.flatnonzero(base.is_text), PREVIOUS, replace=False).tolist()
    took, _ = seconds(lambda: [mask.blocked_after(index) for index in previous])
    print(f"canonical mask, per previous token {1e3 * took / PREVIOUS:.1f} ms")
    whole = [index for index in np.flatnonzero(base.is_text).tolist() if base.bytes[index].isascii()]
    texts = [b"".join(base.bytes[i] for i in rng.choice(whole, TOKENS)).decode() for _ in range(TEXTS)]
    megabytes = sum(map(len, texts)) / 1e6
    batches = [texts[i : i + BATCH] for i in range(0, TEXTS, BATCH)]
    runs = []
    for _ in range(3):
        encoding = sum(seconds(lambda b=b: (expert.ids_of(b), base.ids_of(b)))[0] for b in batches)
        runs.append((encoding, seconds(lambda: count(expert, base, bridge.leaves, texts))[0]))
    tokenizers, both = np.min(runs, axis=0)
    print(f"tokenizers {megabytes / tokenizers:.1f} MB/s, counting beside them {megabytes / (both - tokenizers):.1f} MB/s")


if __name__ == "__main__":
    main()
