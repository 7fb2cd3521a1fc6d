"""The exemplars under torchrun, in two processes over gloo: DDP and FSDP give the losses of one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from chassis.distill.config import load_config
from chassis.distill.inputs import write_caches
from chassis.distill.run import distill
from support import logged

EXEMPLARS = Path(__file__).parents[1] / "examples"
FSDP = ["training.fsdp=true", "training.save_every=2"]
# Each case: an exemplar, what is changed besides paths and length, and how far its losses may be from one process's.
CASES = {
    "one-teacher": ("one-teacher", [], 1e-4),
    "several-teachers": ("several-teachers", [], 1e-4),
    "cached-teacher": ("cached-teacher", [], 1e-4),
    "fused-head": ("one-teacher", ["training.fused_head=true"], 1e-4),
    "fsdp": ("several-teachers", [*FSDP, "training.precision=float32"], 1e-4),
    "fsdp-bfloat16": ("one-teacher", FSDP, 2e-3),  # rounds all weights to bfloat16, where autocast keeps the norms
}
NAMES = ("loss", "kl_loss", "ce_loss", "kl_loss_scale", "grad_norm", "eval_bits_per_byte", "eval_kl_loss_t0")
# Commands one after another in the same two processes. A checkpoint's path is a kill while that was written.
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch.distributed as dist
from chassis.cli import main

for words in json.load(open(sys.argv[1])):
    if isinstance(words, str):
        dist.barrier()
        Path(words, "trainer_state.json").unlink(missing_ok=True)
        dist.barrier()
        continue
    sys.argv = ["chassis", "distill", *words]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise
"""


def words(case, tiny_testbed, documents, out):
    """The arguments of `chassis distill`: an exemplar's file, and what makes it short and local."""
    name, extra, _ = CASES[case]
    path = EXEMPLARS / f"{name}.yaml"
    data = {"train": f"[{documents}/fit.jsonl]", "validation": f"[{documents}/validation.jsonl]"}
    data |= {"pack_length": 300, "max_tokens": 64}
    steps = {"steps": 3, "batch_size": 4, "micro_batch_size": 2, "warmup_steps": 1, "learning_rate": 1e-3, "device": "cpu"}
    steps |= {"evaluate_every": 3, "workers": 0}
    found = {"student": tiny_testbed.base, "out": out}
    found |= {f"data.{key}": value for key, value in data.items()} | {f"training.{key}": v for key, v in steps.items()}
    for i in range(len(load_config(path).teachers)):
        found[f"teachers.{i}.model"] = (tiny_testbed.other_expert, tiny_testbed.expert)[i]
    if name == "cached-teacher":
        found["teachers.0.cache"] = out.parents[1] / "cache"
    return ["--config", str(path), *(f"{key}={value}" for key, value in found.items()), *extra]


@pytest.fixture(scope="module")
def runs(tiny_testbed, distill_documents, tmp_path_factory):
    """{case: (results of one process, of two)}; fsdp is stopped while it writes its last checkpoint, and goes on."""
    folder, alone, commands = tmp_path_factory.mktemp("torchrun"), {}, []
    for case in CASES:
        _, path, *overrides = words(case, tiny_testbed, distill_documents, folder / "alone" / case)
        config = load_config(path, [word for word in overrides if "fsdp=" not in word])
        if case == "cached-teacher":
            write_caches(config, lambda *_: None)
        alone[case] = distill(config)
        commands.append(words(case, tiny_testbed, distill_documents, folder / "two" / case))
        if case == "fsdp":
            commands += [str(folder / "two/fsdp/checkpoints/checkpoint-3"), commands[-1]]
    (folder / "run.py").write_text(SCRIPT)
    (folder / "commands.json").write_text(json.dumps(commands))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", "localhost:0", str(folder / "run.py"), str(folder / "commands.json")]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return {case: (alone[case], json.loads((folder / "two" / case / "results.json").read_text())) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(runs, case):
    one, two = runs[case]
    for name in NAMES[:5] if case != "fsdp-bfloat16" else ():
        assert logged(two, name)[0] == pytest.approx(logged(one, name)[0], rel=1e-5), name
    for name in NAMES:
        assert logged(two, name) == pytest.approx(logged(one, name), rel=CASES[case][2]), name
