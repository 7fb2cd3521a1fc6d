"""The vector exponential and the bf16/fp16 conversions of every instruction set, against libm and torch."""

import os
import subprocess
import sys

import pytest
import torch

from chassis_kernels import backends

pytestmark = pytest.mark.skipif(backends._C is None, reason="the C++ extension is not built")


def exp(x):
    out = torch.empty_like(x)
    backends._C.exp_nonpositive(x.data_ptr(), out.data_ptr(), x.numel())
    return out


def convert(x, dtype):
    out = torch.empty(x.shape, dtype=dtype)
    backends._C.convert(backends.matrix_args(x), backends.matrix_args(out))
    return out


def test_exp_is_within_one_and_a_quarter_ulp():
    x = torch.cat([torch.linspace(-87.3, 0, 300_001), -torch.logspace(-45, 1, 10_001)])
    truth = x.double().exp()
    # an ulp is at most 2^-23 of the value: one for the polynomial, a quarter for the reduction of x
    assert float(((exp(x).double() - truth) / truth).abs().max()) < 1.25 * 2**-23


def test_exp_ends_at_exactly_zero_and_one_and_keeps_nan():
    x = torch.tensor([0.0, -0.0, -87.4, -100, -1e30, -torch.inf, torch.nan])
    assert torch.equal(exp(x)[:6], torch.tensor([1.0, 1, 0, 0, 0, 0]))
    assert exp(x)[6].isnan() and exp(x.repeat(20))[6::7].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_widens_exactly_and_comes_back(dtype):
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = convert(halves, torch.float32)
    assert torch.equal(wide.isnan(), halves.isnan())
    assert torch.equal(wide.nan_to_num(7.0).view(torch.int32), halves.float().nan_to_num(7.0).view(torch.int32))
    back = convert(wide, dtype)
    assert torch.equal(back.isnan(), halves.isnan())
    assert torch.equal(back[~halves.isnan()].view(torch.int16), halves[~halves.isnan()].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrowing_rounds_to_nearest_even_like_torch(dtype):
    bits = torch.randint(-(2**31), 2**31, (400_003,), generator=torch.Generator().manual_seed(0))
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    ties = (halves[1:] + halves[:-1]) / 2  # halfway cases, subnormals and the edge of infinity among them
    x = torch.cat([bits.to(torch.int32).view(torch.float32), ties, torch.tensor([65519.0, 65520.0, 1e-8, -1e-8, 3.4e38])])
    found, expected = convert(x, dtype), x.to(dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[~x.isnan()].view(torch.int16), expected[~x.isnan()].view(torch.int16))


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set_passes(isa):
    if backends._C.isa() == isa or (isa == "avx2" and backends._C.isa() == "portable"):
        pytest.skip("this session ran it, or this processor cannot")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not instruction_set", __file__],
        env=os.environ | {"CHASSIS_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_an_instruction_set_that_is_not_there_is_an_error():
    code = "from chassis_kernels import _C; _C.isa()"
    environment = os.environ | {"CHASSIS_CPU_ISA": "sse9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "CHASSIS_CPU_ISA=sse9: expected portable, avx2 or avx512" in done.stderr
