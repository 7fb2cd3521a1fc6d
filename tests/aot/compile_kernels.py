"""Compiles every Triton kernel for GPUs that need not be there, as JSON lines: `python compile_kernels.py PART PARTS`.

Each op runs on its example with the launches turned into compilations: for each architecture, each entry of its tuning
table and each dtype. What the compilers say about registers, stack and shared memory goes to stdout.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from chassis_kernels import backends
from chassis_kernels.triton import shared, tuning

TARGETS = {name: GPUTarget("cuda", int(name[3:]), 32) for name in tuning.ARCHITECTURES if name.startswith("sm_")}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.int64: "i64",
    torch.int32: "i32", torch.bool: "i1", torch.uint8: "u8",
}  # fmt: skip
# Arguments that choose other constants than an op's example does: a list of choices where there are several.
_PLAIN = {"labels": None, "tail": False}
_DIVERGENCES = [_PLAIN | {"divergence": code} for code in (0, 1)]  # examples have the third, with a tail
_TOKENS = [{"reverse": True}, {"columns": None, "keep": None, "reverse": True}]
_MASK = ("blocked_start", "blocked", "previous")
_HEADS = [dict.fromkeys(("W_b", "bias_a", "bias_b", "c", "softcap_a"))]
OTHERWISE = {
    "bridge_project": [
        dict.fromkeys(("index", "index_start", "log_weight", "log_probs", "ids", "listed_start", *_MASK, "floor")),
    ],
    "delta_logits_": [dict.fromkeys(("bias", "mean", "cols", "adapter_id"))],
    "linear_kl": _HEADS,
    "linear_kl_backward": _HEADS,
    "linear_projection_kl": [{"softcap": None} | other for other in _DIVERGENCES],
    "linear_projection_kl_backward": [{"softcap": None, "grad_nll": None} | other for other in _DIVERGENCES],
    "moments_update_": [dict.fromkeys(("mean_y", "xy", "yy", "y", "weight"), []) | {"x": [torch.ones(2**13 + 1, 3)] * 2}],
    "projection_kl": _DIVERGENCES,
    "projection_kl_backward": [{"grad_nll": None} | other for other in _DIVERGENCES],
    "projection_kl_": [{"nll_weight": None} | other for other in _DIVERGENCES],
    "token_kl": _TOKENS,
    "token_kl_backward": _TOKENS,
    "token_kl_": _TOKENS,
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def launches():
    """(op, kernel, arguments) of every launch on every op's example and OTHERWISE, in each dtype; nothing runs."""
    shared._describe = lambda device: ("interpreter", "interpreter")
    found = []
    shared.run = lambda op, kernel, programs, arguments, meta: found.append((op, kernel, arguments))
    for op in backends.OPS.values():
        if "triton" not in op.implementations:
            continue
        names = [argument.name for argument in getattr(torch.ops.chassis, op.name).default._schema.arguments]
        for dtype, other in itertools.product(op.implementations["triton"].dtypes, ({}, *OTHERWISE.get(op.name, ()))):
            arguments = dict(zip(names, op.example("cpu"), strict=True)) | other
            op.implementations["triton"].run(*(as_type(name, a, dtype) for name, a in arguments.items()))
    return found


def as_type(name, argument, dtype):
    """Matrices and biases of floats in `dtype`; vectors of statistics and weights stay as they are."""
    if isinstance(argument, list):
        return [as_type(name, each, dtype) for each in argument]
    floats = isinstance(argument, torch.Tensor) and argument.dtype == torch.float32
    return argument.to(dtype) if floats and (argument.dim() > 1 or "bias" in name) else argument


def source(kernel, arguments, constants, aligned):
    """What Triton's launcher would compile: types, constants, and which pointers and sizes are multiples of 16."""
    signature, fixed, multiples = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = constants.get(parameter.name, arguments.get(parameter.name))
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], fixed[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], multiples[(i,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if aligned:
                multiples[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, fixed, multiples)


def resources(compiled, architecture):
    """Registers and bytes of stack a thread, bytes of shared memory a block."""
    if architecture.startswith("gfx"):
        found = {k: int(v) for k, v in re.findall(r"^\s*\.(\w+):\s+(\d+)$", compiled.asm["amdgcn"], re.MULTILINE)}
        spilled = found["vgpr_spill_count"] + found["sgpr_spill_count"]
        return {"registers": found["vgpr_count"], "stack": found["private_segment_fixed_size"] + spilled,
                "shared": compiled.metadata.shared, "fp64": False}  # fmt: skip
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", listing.stdout.splitlines()[-1])}
    return {"registers": found["REG"], "stack": found["STACK"] + found["LOCAL"],
            "shared": found["SHARED"] + compiled.metadata.shared, "fp64": ".f64" in compiled.asm["ptx"]}  # fmt: skip


def jobs():
    seen = set()
    for op, kernel, arguments in launches():
        entries = tuning.tables(op)[kernel.__name__]
        for architecture in TARGETS:
            tried = {**{json.dumps(e): e for e in entries[architecture].values()}}
            for name, sizes in entries.items():
                if name not in tuning.ARCHITECTURES and TARGETS[architecture].backend == "cuda":
                    tried |= {json.dumps(e): e for e in sizes.values()}
            for meta, aligned in itertools.product(tried.values(), (True, False)):
                if not aligned and architecture != "sm_90":
                    continue
                constants = {k: v for k, v in meta.items() if k not in tuning.OPTIONS}
                options = {k: meta[k] for k in tuning.OPTIONS} | {"enable_fp_fusion": True}
                made = source(kernel, arguments, constants, aligned)
                row = {"op": op, "kernel": kernel.__name__, "architecture": architecture, "entry": meta, "aligned": aligned,
                       "types": " ".join(t for t in made.signature.values() if t.startswith("*"))}  # fmt: skip
                row["constants"] = {k: v for k, v in arguments.items() if made.signature.get(k) == "constexpr"}
                key = json.dumps(row, sort_keys=True, default=str)
                if key not in seen:
                    seen.add(key)
                    yield key, row, made, architecture, options


def main(part: int, parts: int) -> None:
    for key, row, made, architecture, options in jobs():
        if zlib.crc32(key.encode()) % parts == part:
            compiled = triton.compile(made, target=TARGETS[architecture], options=options)
            print(json.dumps(row | resources(compiled, architecture), default=str), flush=True)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("TRITON_INTERPRET is set: nothing can be compiled")
    main(*map(int, sys.argv[1:]))
