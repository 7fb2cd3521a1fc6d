"""Memory for gradients: its shape, its reuse after it is freed, and gradients that are made once and handed over."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from chassis_kernels import pages, token_kl
from chassis_kernels.backends import OPS

LARGE = pages.LEAST // 4  # float32 values


@pytest.fixture(autouse=True)
def nothing_kept():
    pages.release()
    yield
    pages.release()


def test_shape_and_dtype():
    kinds = ((3, LARGE), torch.float32), ((LARGE, 5), torch.bfloat16), ((2, 3), torch.float16), ((0, 4), torch.float32)
    for shape, dtype in kinds:
        made = pages.empty(shape, dtype)
        assert made.shape == shape and made.dtype == dtype and made.is_contiguous()
        made.fill_(2)
        assert bool((made == 2).all())


@pytest.mark.skipif(not hasattr(pages.mmap, "MADV_HUGEPAGE"), reason="pages of 2 MiB are asked for on Linux")
def test_the_next_tensor_takes_the_freed_memory():
    first = pages.empty((LARGE,), torch.float32)
    place, view = first.data_ptr(), first.view(2, -1)[1]
    del first
    other = pages.empty((LARGE,), torch.float32)  # a view still needs the first
    assert other.data_ptr() != place
    del view
    assert pages.empty((2 * LARGE - 3,), torch.bfloat16).data_ptr() == place


@pytest.mark.skipif(not hasattr(pages.mmap, "MADV_HUGEPAGE"), reason="pages of 2 MiB are asked for on Linux")
def test_three_blocks_are_kept_the_last_ones():
    blocks = [pages.empty((n * LARGE,), torch.float32) for n in (1, 3, 4, 9)]
    while blocks:
        del blocks[0]
    assert [len(block) for block in pages._kept] == [3 * pages.LEAST, 4 * pages.LEAST, 9 * pages.LEAST]
    small = pages.empty((LARGE,), torch.float32)  # not out of a block of more than twice its size
    assert small.nbytes == pages.LEAST and len(pages._kept) == 3
    large = pages.empty((5 * LARGE,), torch.float32)
    assert large.nbytes == 5 * pages.LEAST and [len(block) for block in pages._kept] == [3 * pages.LEAST, 4 * pages.LEAST]


def loss_of(student, **options):
    teacher = torch.randn(student.shape, generator=torch.Generator().manual_seed(1))
    return token_kl(student, teacher.to(student.dtype), torch.ones(student.shape[:2]), vocab_topk=20, n_tokens=6, **options)


def logits(dtype=torch.float32):
    return torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def runs(names):
    return [sum(OPS[name].calls.values()) for name in names]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_pass_makes_loss_and_gradient(dtype):
    """float16 is rounded after its scale: with its gradient made first, a loss scale could not save it from underflow."""
    names, student = ("token_kl", "token_kl_backward", "token_kl_"), logits(dtype)
    before = runs(names)
    (grad,) = torch.autograd.grad(loss_of(student), student)
    made = [b - a for a, b in zip(before, runs(names), strict=True)]
    assert made == ([1, 1, 0] if dtype == torch.float16 else [0, 0, 1])
    with torch.no_grad():
        loss_of(student)
    assert runs(names)[0] == before[0] + made[0] + 1


def test_small_gradients_survive_a_loss_scale_in_float16():
    student = logits(torch.float16)
    (grad,) = torch.autograd.grad(1e-7 * loss_of(student) * 2.0**24, student)
    (right,) = torch.autograd.grad(loss_of(student), student)
    torch.testing.assert_close(grad.float(), right.float() * 1e-7 * 2**24, rtol=2e-3, atol=1e-6)


def test_a_second_backward_makes_the_gradient_again():
    student = logits()
    loss = loss_of(student)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    kept = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(2 * loss, student)[0], 2 * kept)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_changed_logits_are_noticed_by_a_second_backward():
    head = logits()
    student = head * 1.0
    loss = loss_of(student)
    loss.backward(retain_graph=True)
    student.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_second_derivative():
    student = logits()
    (grad,) = torch.autograd.grad(loss_of(student), student, create_graph=True)
    with pytest.raises(RuntimeError, match="token_kl has no second derivative"):
        grad.sum().backward()


def test_a_mask_may_have_a_gradient_of_its_own():
    student, mask = logits(), torch.ones(2, 3, requires_grad=True)
    teacher = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(1))
    token_kl(student, teacher, mask, n_tokens=6).backward()
    assert mask.grad.abs().min() > 0 and student.grad.abs().sum() > 0


def faults_of_freed_blocks(first: str) -> int:
    """Pages that a process, having run `first`, touches anew while it makes and frees the same 30 MiB 20 times."""
    script = f"""
import resource, torch
from chassis_kernels import pages
{first}
def step():
    blocks = [torch.empty(1 << 20, dtype=torch.uint8).fill_(1) for _ in range(30)]
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what malloc keeps is glibc's matter")
def test_freed_blocks_of_a_step_serve_the_next_one():
    assert faults_of_freed_blocks("pages.keep_heap()") < 1000  # without: 7,680 a step, unless the heap lies otherwise
