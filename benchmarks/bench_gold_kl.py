"""gold_kl against eager PyTorch: half of the student's tokens have an exact partner, the 8192 likeliest others are compared.

    python benchmarks/bench_gold_kl.py [--shape small|large] [--dtype fp32|bf16] [--rounds 7] [--json]
"""

from bench_projection_kl import inputs, main

from chassis_kernels.gold_kl import gold_kl
from chassis_kernels.reference import gold_kl as reference


def providers(*_) -> dict:
    """name -> loss of (student, teacher, projection, chunks)."""
    return {
        "reference": lambda *given: reference.loss(*given)[0],
        "chassis_fresh": lambda *given: gold_kl(*given)[0],
    }


if __name__ == "__main__":
    main("gold_kl", lambda shape, dtype: inputs(shape, dtype, exact=0.5), providers, __doc__)
