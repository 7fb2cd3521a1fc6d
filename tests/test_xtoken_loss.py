"""The composed distillation loss: published numbers (compat), better defaults, parts against definitions, refusals."""

import json
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.timing import peak_bytes
from chassis_kernels import backends
from chassis_kernels.chunks import Chunks
from chassis_kernels.sparse import SparseProjection
from chassis_kernels.xtoken_config import TeacherConfig, XTokenConfig
from chassis_kernels.xtoken_loss import TeacherBatch, xtoken_loss

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "xtoken_loss.json").read_text())


@pytest.fixture(scope="module")
def tensors():
    return load_file(DATA / "xtoken_loss.safetensors")


def problem(case, tensors, **options):
    """Config, keyword arguments and teachers of a golden case."""
    given = {name.split("/", 2)[2]: t for name, t in tensors.items() if name.startswith(f"{case['case']}/inputs/")}
    sizes, same = case["teacher_vocab_sizes"], case["same_vocab"]
    config = XTokenConfig.from_lists(case["student_vocab_size"], sizes, same, **case["config"], **options)
    alignment = Chunks(*(given[name] for name in ("student_chunk_id", "teacher_chunk_id", "pair_valid", "pair_is_correct")))
    teachers = []
    for i, size in enumerate(sizes):
        logits = given[f"teacher_logits/{i}"]
        if same[i]:
            teachers.append(TeacherBatch(logits))
            continue
        projection = SparseProjection(given["projection_indices"], given["projection_likelihoods"], size)
        own = given["teacher_input_ids"], given["teacher_token_mask"]
        teachers.append(TeacherBatch(logits, projection, alignment, *own))
    rest = {name: given[name] for name in ("input_ids", "token_mask", "sample_mask")}
    return given["student_logits"], teachers, config, {**rest, "global_valid_tokens": given["global_valid_toks"]}


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['case']}-{case['name']}")
def test_published_numbers(case, eager, tensors):
    logits, teachers, config, rest = problem(case, tensors, compat=True)
    logits = logits.clone().requires_grad_()
    loss, metrics = xtoken_loss(logits, teachers, config, **rest, eager=eager)
    loss.backward()
    torch.testing.assert_close(loss.detach(), tensors[f"{case['case']}/loss"][0], rtol=1e-4, atol=0)
    wanted = tensors[f"{case['case']}/student_grad"]
    assert (logits.grad - wanted).norm() <= 1e-4 * wanted.norm()
    assert set(metrics) == set(case["metrics"])
    for name, value in case["metrics"].items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("number", [0, 4, 13, 22, 41, 71, 73])
def test_gradients_in_float64(number, tensors):
    logits, teachers, config, rest = problem(CASES[number], tensors)
    teachers = [t._replace(logits=t.logits.double()) for t in teachers]
    logits = logits[:1, :5].double().requires_grad_()
    rest = {name: t[:1, :5] if t.dim() == 2 else t[:1] if t.dim() else t for name, t in rest.items()}
    cut = []
    for t in teachers:
        if t.chunks is None:
            cut.append(TeacherBatch(t.logits[:1, :5]))
            continue
        student, teacher, valid, correct = t.chunks
        chunks = Chunks(student[:1, :5], teacher[:1], valid[:1], correct[:1])
        cut.append(t._replace(logits=t.logits[:1], chunks=chunks, input_ids=t.input_ids[:1], token_mask=t.token_mask[:1]))
    assert torch.autograd.gradcheck(lambda z: xtoken_loss(z, cut, config, **rest, eager=True)[0], logits)


def test_padding_does_not_choose_columns_by_default(tensors):
    case = next(c for c in CASES if c["config"]["vocab_topk"] == 9 and c["name"] == "p_kl")
    losses = {}
    for compat in (False, True):
        for value in (0.0, 50.0):
            logits, teachers, config, rest = problem(case, tensors, compat=compat)
            wild = teachers[0].logits.clone()
            wild[2, -2:, ::3] += value
            mask = teachers[0].token_mask.clone()
            mask[2, -2:] = 0
            teachers = [teachers[0]._replace(logits=wild, token_mask=mask)]
            losses[compat, value] = float(xtoken_loss(logits, teachers, config, **rest)[1]["kl_loss"])
    assert losses[False, 0.0] == losses[False, 50.0]
    assert losses[True, 0.0] != losses[True, 50.0]


def part(logits, teachers, rest, rows):
    """The samples `rows` of a problem."""
    cut = []
    for t in teachers:
        chunks = None if t.chunks is None else Chunks(*(x[rows] for x in t.chunks))
        own = (None, None) if t.input_ids is None else (t.input_ids[rows], t.token_mask[rows])
        cut.append(TeacherBatch(t.logits[rows], t.projection, chunks, *own))
    return logits[rows], cut, {name: x[rows] if x.dim() else x for name, x in rest.items()}


def _rank(rank, port):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    tensors = load_file(DATA / "xtoken_loss.safetensors")
    for number in (0, 12, 22, 71, 72):
        logits, teachers, config, rest = problem(CASES[number], tensors)
        whole = logits.clone().requires_grad_()
        right, _ = xtoken_loss(whole, teachers, config, **rest)
        right.backward()
        for shares in (([0, 2], [1]), ([1], [0, 2]), ([0], [1, 2])):
            mine, its_teachers, its_rest = part(logits, teachers, rest, shares[rank])
            mine = mine.clone().requires_grad_()
            loss, _ = xtoken_loss(mine, its_teachers, config, **its_rest, group=torch.distributed.group.WORLD)
            loss.backward()
            total = loss.detach().clone()
            torch.distributed.all_reduce(total)
            torch.testing.assert_close(total, right.detach(), rtol=1e-5, atol=0)
            torch.testing.assert_close(mine.grad, whole.grad[shares[rank]], rtol=1e-4, atol=1e-7)
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_even_if_one_has_no_valid_chunk():
    """Sample 1 is masked: a rank that holds it alone has nothing to compare, and must not hang the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port,), nprocs=2)


def test_kd_does_not_depend_on_the_micro_batch_split(tensors):
    for name in ("p_kl", "gold", "same_vocab"):
        case = next(c for c in CASES if c["name"] == name and not c["config"]["dynamic_loss_scaling"])
        logits, teachers, config, rest = problem({**case, "config": {**case["config"], "vocab_topk": 8192}}, tensors)
        logits = logits.clone().requires_grad_()
        whole, metrics = xtoken_loss(logits, teachers, config, **rest)
        n = metrics.get("num_valid_pairs_t0", metrics.get("num_valid_chunks_t0"))
        parts = []
        for b in range(3):
            mine, (teacher,), its_rest = part(logits, teachers, rest, [b])
            teacher = teacher._replace(global_valid_chunks=n)
            parts.append(xtoken_loss(mine, [teacher], config, **its_rest)[0])
        torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=0)
        grads = [torch.autograd.grad(loss, logits)[0] for loss in (sum(parts), whole)]
        assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[1].norm()


def test_wide_student_head_is_cut(tensors):
    for name in ("p_kl", "gold", "same_vocab", "averaged_logits"):
        case = next(c for c in CASES if c["name"] == name)
        logits, teachers, config, rest = problem(case, tensors)
        wide = torch.cat([logits, torch.full((*logits.shape[:2], 3), 99.0)], 2).requires_grad_()
        narrow = logits.clone().requires_grad_()
        losses = [xtoken_loss(z, teachers, config, **rest)[0] for z in (narrow, wide)]
        torch.testing.assert_close(*losses)
        sum(losses).backward()
        torch.testing.assert_close(wide.grad[..., :40], narrow.grad)
        assert not wide.grad[..., 40:].any()


def test_nothing_valid_gives_zero_kd_and_zero_gradient(tensors):
    for name in ("p_kl", "gold", "same_vocab"):
        case = next(c for c in CASES if c["name"] == name)
        logits, teachers, config, rest = problem(case, tensors)
        logits = logits.clone().requires_grad_()
        rest |= {"sample_mask": torch.zeros(3), "global_valid_tokens": torch.tensor(0.0)}
        loss, metrics = xtoken_loss(logits, teachers, config, **rest)
        loss.backward()
        assert loss == 0 and metrics["kl_loss"] == 0 and metrics["kl_loss_scale"] == 1
        assert not logits.grad.any()


@pytest.mark.skipif(backends._C is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("options", [{"same_tokenizer": True}, {"gold_loss": True}, {}], ids=str)
def test_no_float32_copy_of_bfloat16_logits(options):
    """The step makes gradients for CE and KD (one for both with P-KL), their sum and some scratch; a copy is two more."""
    g = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(1, 512, 12000, generator=g).bfloat16() for _ in range(2))
    config = XTokenConfig(12000, (TeacherConfig(12000, **options),), vocab_topk=2000)
    ids = torch.randint(-1, 100, (1, 512), generator=g)
    projection = SparseProjection(torch.randint(0, 12000, (12000, 2), generator=g), torch.ones(12000, 2), 12000)
    chunks = Chunks(ids, ids, torch.ones(1, 100, dtype=torch.bool))
    rest = {"input_ids": torch.randint(0, 12000, (1, 512), generator=g), "token_mask": torch.ones(1, 512)}
    logits.requires_grad_()
    projection.columns, projection.exact_map()  # noqa: B018 - kept by the projection

    def step():
        loss, metrics = xtoken_loss(logits, [TeacherBatch(teacher, projection, chunks)], config, **rest)
        torch.autograd.grad(loss, logits)
        assert metrics["accuracy"] < 0.1

    gradients = 1 if not options else 3
    assert peak_bytes(step, torch.device("cpu")) <= (gradients + 0.5) * logits.nbytes


def test_ties_of_the_largest_logit_count_as_right(tensors):
    logits, teachers, config, rest = problem(CASES[0], tensors)
    for eager in (True, False):
        assert xtoken_loss(torch.zeros_like(logits), teachers, config, **rest, eager=eager)[1]["accuracy"] == 1


def test_token_count_defaults_to_this_batch(tensors):
    logits, teachers, config, rest = problem(CASES[0], tensors)
    given, _ = xtoken_loss(logits, teachers, config, **rest)
    counted, _ = xtoken_loss(logits, teachers, config, **{**rest, "global_valid_tokens": None})
    assert given == counted


GOOD = {"student_vocab_size": 40, "teachers": (TeacherConfig(30), TeacherConfig(40, same_tokenizer=True))}
REFUSED = {
    "needs gold_loss=True": {"xtoken_loss": True},
    "teacher 0 has xtoken_loss without gold_loss": {"teachers": [TeacherConfig(30, xtoken_loss=True)]},
    "kd_loss_mode is 'best'": {"kd_loss_mode": "best"},
    "sum_weights_metric is 'loss'": {"sum_weights_metric": "loss"},
    "'ce' needs kd_loss_mode='sum'": {"sum_weights_metric": "ce", "kd_loss_mode": "select_teacher"},
    "normalize_teacher_by_vocab needs": {"normalize_teacher_by_vocab": True, "kd_loss_mode": "averaged_logits"},
    "weights sum to 0": {
        "kd_loss_mode": "averaged_logits",
        "teachers": [TeacherConfig(30, weight=1.0), TeacherConfig(30, weight=-1.0)],
    },
    "teachers is empty": {"teachers": ()},
    "teacher 0 has 30 tokens and the student 40": {"teachers": [TeacherConfig(30, same_tokenizer=True)]},
    "teacher 0 overrides": {"kd_loss_mode": "select_teacher", "teachers": [TeacherConfig(30, gold_loss=True)]},
    "temperature is 0": {"temperature": 0.0},
    "vocab_topk is 0": {"vocab_topk": 0},
    "alpha is nan": {"alpha": float("nan")},
    "teacher 0 has vocab_size 0": {"teachers": [TeacherConfig(0)]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_contradictions_are_refused_at_construction(message):
    with pytest.raises(ValueError, match=message):
        XTokenConfig(**{**GOOD, **REFUSED[message]})
    XTokenConfig(**GOOD)


def test_ragged_teacher_lists_are_refused():
    with pytest.raises(ValueError, match="teacher_weights has 1 entries for 2"):
        XTokenConfig.from_lists(40, [30, 30], [False, False], teacher_weights=[1.0])


def test_inputs_that_do_not_fit_are_refused(tensors):
    logits, teachers, config, rest = problem(CASES[22], tensors)
    cross, same = teachers
    small = SparseProjection(torch.zeros(39, 1).long(), torch.ones(39, 1), 30)
    for changed, message in (
        ([cross], "1 teachers given, but the configuration names 2"),
        ([same, same], "teacher 0 has its own tokenizer"),
        ([cross, TeacherBatch(same.logits[:, 1:])], "teacher 1 shares the student's tokenizer"),
        ([cross._replace(logits=cross.logits[..., :20]), same], "teacher 0: logits have shape"),
        ([cross._replace(projection=small), same], r"\(39, 30\)"),
    ):
        with pytest.raises(ValueError, match=message):
            xtoken_loss(logits, changed, config, **rest)
    with pytest.raises(ValueError, match="student_logits has shape"):
        xtoken_loss(logits[..., :39], teachers, config, **rest)
    with pytest.raises(ValueError, match="sample_mask has shape"):
        xtoken_loss(logits, teachers, config, **{**rest, "sample_mask": torch.ones(2)})
