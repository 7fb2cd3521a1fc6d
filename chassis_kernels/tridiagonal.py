"""S = Q T Qᵀ with T tridiagonal: what a path of ridge penalties needs, for a fraction of the price of eigenvectors.

Q stays a product of Householder reflectors; a penalty then costs O(D) a target and not O(D²) (Eldén 1977). Three ops,
float64 on the CPU: their equations stand in `reference/tridiagonal.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chassis_kernels import backends
from chassis_kernels.reference import tridiagonal as reference

BLOCK = 96  # reflectors applied together
SAFE = 1e-100, 1e100  # for the largest entry: its square neither overflows nor vanishes


@dataclass(eq=False)
class Tridiagonal:
    """A symmetric matrix as Q T Qᵀ; all float64 on the CPU."""

    diagonal: Tensor  # [D] of T
    off: Tensor  # [D - 1] beside it
    reflectors: Tensor  # [P, D], P the next multiple of BLOCK, the last of them 0
    factors: Tensor  # [P, BLOCK]: Q = Π (I − V F Vᵀ) over blocks of reflectors V with their F

    @classmethod
    def of(cls, S: Tensor) -> Tridiagonal:
        """Of a symmetric matrix [D, D], float64 on the CPU, whose largest entry lies within SAFE. S may be overwritten.

        Raises ValueError for what is no such matrix; its symmetry and SAFE are not checked.
        """
        if S.dim() != 2 or S.shape[0] != S.shape[1] or len(S) == 0 or S.dtype != torch.float64 or S.device.type != "cpu":
            raise ValueError(f"S is {S.dtype} {tuple(S.shape)} on {S.device}, expected float64 [D, D] on the CPU with D > 0")
        S, size = S.contiguous(), len(S)
        diagonal, off, scales = _reduce(S)
        padded = -(-size // BLOCK) * BLOCK
        reflectors = S.new_zeros(padded, size)
        reflectors[:size] = S
        return cls(diagonal, off, reflectors, _factors(reflectors, torch.nn.functional.pad(scales, (0, padded - size + 1))))

    @classmethod
    def quickly(cls, S: Tensor) -> Tridiagonal | None:
        """`of`, for positive semi-definite S; None where eigenvectors must do: no CPU, no kernel, entries beyond SAFE."""
        if S.device.type != "cpu" or not SAFE[0] < float(S.diagonal().max()) < SAFE[1]:  # where the largest entry stands
            return None
        try:  # the reference is slower than eigenvectors, and other backends have none
            kernel = backends.select(_reduce.name, "cpu", (S.dtype,)) == "cpu"
        except backends.BackendError:
            kernel = False
        return cls.of(S) if kernel else None

    def definite(self, alpha: float) -> bool:
        """Whether S + α is positive definite: whether all pivots of T + α are positive (Sylvester's law of inertia)."""
        pivot, squares = 1.0, [0.0, *self.off.square().tolist()]
        for entry, square in zip(self.diagonal.tolist(), squares, strict=True):
            pivot = entry + alpha - square / pivot
            if not pivot > 0:
                return False
        return True

    def largest(self) -> float:
        """A bound of the largest eigenvalue, within twice of it for a positive semi-definite S (Gershgorin)."""
        beside = torch.nn.functional.pad(self.off.abs(), (1, 1))
        return float((self.diagonal + beside[:-1] + beside[1:]).max())

    def path(self, C: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """R = QᵀC [D, T] of C [D, T]; C·W and W·W [A, T], summed over rows, with W = (S + α)⁻¹ C; tr (S + α)⁻¹ [A]."""
        self._check(C, alphas, len(alphas))
        return _path(*self._operands, C, alphas)

    def solve(self, R: Tensor, alphas: Tensor) -> Tensor:
        """(S + α_j)⁻¹ C [D, T] for the R [D, T] of `path` and alphas [T]; all of them must make S + α positive definite."""
        self._check(R, alphas, R.shape[-1])
        return _solve(*self._operands, R, alphas)

    def _check(self, right: Tensor, alphas: Tensor, count: int) -> None:
        if right.dim() != 2 or len(right) != len(self.diagonal) or alphas.shape != (count,):
            raise ValueError(
                f"{tuple(right.shape)} and alphas {tuple(alphas.shape)}: expected [{len(self.diagonal)}, T] and [{count}]"
            )
        if {right.dtype, alphas.dtype} != {torch.float64}:
            raise ValueError(f"{right.dtype} and alphas {alphas.dtype}: expected float64")

    @property
    def _operands(self) -> tuple[Tensor, ...]:
        return self.reflectors, self.factors, self.diagonal, self.off


def _factors(reflectors: Tensor, scales: Tensor) -> Tensor:
    """F of every block of I − τ v vᵀ: (I + τ striu(V Vᵀ))⁻¹ τ (Schreiber & Van Loan 1989), [P, BLOCK]."""
    blocks = reflectors.view(-1, BLOCK, reflectors.shape[1])
    tau = scales.view(-1, BLOCK, 1)
    upper = tau * (blocks @ blocks.mT).triu(1)
    return torch.linalg.solve_triangular(upper, torch.diag_embed(tau[..., 0]), upper=True, unitriangular=True).reshape(
        -1, BLOCK
    )


def _cpu_reduce(S):
    diagonal, off, scales = S.new_empty(len(S)), S.new_empty(len(S) - 1), S.new_empty(len(S) - 1)
    backends._C.tridiagonal_reduce_(backends.matrix_args(S), *(out.data_ptr() for out in (diagonal, off, scales)))
    S.triu_(1)
    return diagonal, off, scales


def _cpu_path(*inputs):
    R, *sums = _fake_path(*inputs)
    kept = [tensor.contiguous() for tensor in inputs]
    backends._C.tridiagonal_path(_matrices(kept), backends.matrix_args(R), tuple(out.data_ptr() for out in sums))
    return R, *sums


def _cpu_solve(*inputs):
    W = inputs[-2].new_empty(inputs[-2].shape)
    kept = [tensor.contiguous() for tensor in inputs]
    backends._C.tridiagonal_solve(_matrices(kept), backends.matrix_args(W))
    return W


def _matrices(tensors: list[Tensor]) -> tuple:
    return tuple(map(backends.matrix_args, tensors))


def _fake_reduce(S):
    return S.new_empty(len(S)), S.new_empty(len(S) - 1), S.new_empty(len(S) - 1)


def _fake_path(reflectors, factors, diagonal, off, C, alphas):
    shape = len(alphas), C.shape[1]
    return C.new_empty(C.shape), C.new_empty(shape), C.new_empty(shape), C.new_empty(len(alphas))


def _problem(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """S [5, 5], C [5, 3] and three alphas."""
    X = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    return X.T @ X, X[:5, :3].contiguous(), X.new_tensor([0.1, 1.0, 10.0])


def _example(device: str) -> tuple:
    S, C, alphas = _problem(device)
    return *Tridiagonal.of(S)._operands, C, alphas


_TENSORS = "Tensor reflectors, Tensor factors, Tensor diagonal, Tensor off"
_CPU = frozenset({torch.float64}), "portable, AVX2 and AVX-512 by tests/test_tridiagonal.py"
_reduce = backends.register(
    "tridiagonal_reduce_(Tensor(a!) S) -> (Tensor, Tensor, Tensor)",
    reference=reference.tridiagonal_reduce_,
    fake=_fake_reduce,
    example=lambda device: _problem(device)[:1],
    cpu=backends.Implementation(_cpu_reduce, *_CPU),
)
_path = backends.register(
    f"tridiagonal_path({_TENSORS}, Tensor C, Tensor alphas) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.tridiagonal_path,
    fake=_fake_path,
    example=_example,
    cpu=backends.Implementation(_cpu_path, *_CPU),
)
_solve = backends.register(
    f"tridiagonal_solve({_TENSORS}, Tensor R, Tensor alphas) -> Tensor",
    reference=reference.tridiagonal_solve,
    fake=lambda reflectors, factors, diagonal, off, R, alphas: R.new_empty(R.shape),
    example=_example,
    cpu=backends.Implementation(_cpu_solve, *_CPU),
)
