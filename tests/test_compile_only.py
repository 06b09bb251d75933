"""The kernels compiled for GPUs that need not be there: do they fit, and do they use matrix instructions?

What the launch layer would start is recorded, so block sizes and switches are the real ones. Triton compiles in a
process of its own, since in this one it may interpret.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

LIMITS = {"sm_80": 163, "sm_90": 227, "gfx942": 64}  # KiB of shared memory a program
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "gfx942": "v_mfma"}
WITHOUT = ("token_kernel", "sums_kernel")  # nothing to multiply
SPILLED = 1024  # bytes a thread: a little of the widest tiles; a layout gone wrong spills several KiB

CASES = [(0, False, 64, 64), (2, True, 128, 128)]  # additive, kda: decay, erase, K, V


@pytest.mark.parametrize("target", LIMITS)
def test_kernels_fit(target):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(
        [sys.executable, __file__, target], env=environment, check=True, capture_output=True, text=True
    ).stdout
    kernels = [json.loads(line) for line in output.splitlines()]
    assert {kernel["name"] for kernel in kernels} == {
        *WITHOUT,
        "pairs_kernel",
        "walk_kernel",
        "walk_back_kernel",
        "gradients_kernel",
    }
    for kernel in kernels:
        assert kernel["shared"] <= LIMITS[target] * 1024, kernel
        assert kernel["matrix"] > 0 or kernel["name"] in WITHOUT, kernel
        assert kernel["spilled"] <= SPILLED, kernel


# ---- the process that compiles ----


def launches(decay, erase, K, V):
    """(kernel, arguments) of a forward in both forms and a backward, in bfloat16."""
    from unittest import mock

    import torch
    from triton.runtime.jit import JITFunction

    from fwp.kernels import launch

    def empty(*size, dtype=torch.float32):
        return torch.empty(2, 128, 4, *size, dtype=dtype)

    def problem():
        q, k, v = (empty(D, dtype=torch.bfloat16) for D in (K, K, V))
        strength = empty() if erase else None
        g = [None, empty(), empty(K)][decay]
        return launch.Problem(q, k, v, g, strength, strength, torch.empty(2, 4, K, V), None, False)

    started = []

    def record(kernel, *, grid, warmup, **arguments):
        started.append((kernel, arguments))

    with mock.patch.object(JITFunction, "run", record):
        launch.forward(problem(), "recurrent", torch.bfloat16)
        launch.forward(problem(), "chunk", torch.bfloat16)
        launch.backward(problem(), empty(V, dtype=torch.bfloat16), torch.empty(2, 4, K, V))
    return started


def compiled(kernel, arguments, target):
    import torch
    import triton
    from triton.compiler import ASTSource

    pointers = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}

    def of(x):
        return pointers[x.dtype] if isinstance(x, torch.Tensor) else "i32"

    def aligned(x):
        return isinstance(x, torch.Tensor) or x % 16 == 0

    signature, constants, attributes = {}, {}, {}
    for at, parameter in enumerate(kernel.params):
        x = arguments[parameter.name]
        if parameter.is_constexpr or x is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", x
        elif isinstance(x, tuple):
            signature[parameter.name] = tuple(map(of, x))
            attributes |= {(at, i): [["tt.divisibility", 16]] for i, y in enumerate(x) if aligned(y)}
        else:
            signature[parameter.name] = of(x)
            if isinstance(x, torch.Tensor):
                attributes[(at,)] = [["tt.divisibility", 16]]
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options | {"enable_fp_fusion": True})


def spilled(binary):
    """Bytes a thread that registers don't hold."""
    import triton

    if "amdgcn" in binary.asm:
        return int(re.search(r"ScratchSize: (\d+)", binary.asm["amdgcn"])[1])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    return int(re.search(r"STACK:(\d+)", usage.stdout)[1])


def main(name):
    from triton.backends.compiler import GPUTarget

    from fwp.kernels import launch

    launch.AMD = name.startswith("gfx")
    target = GPUTarget("hip", name, 64) if launch.AMD else GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    for case in CASES:
        for kernel, arguments in launches(*case):
            binary = compiled(kernel, arguments, target)
            text = binary.asm["amdgcn" if launch.AMD else "ptx"]
            row = {
                "name": kernel.__name__,
                "case": case,
                "shared": binary.metadata.shared,
                "matrix": text.count(MATRIX[name]),
                "spilled": spilled(binary),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
