"""Every operator of the families kron, hadamard and sparse on small ragged inputs, for compute-sanitizer.

python -m bench.gpu.tiny_parts [--device cuda]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch

from bench.gpu import part_operators as whole
from bench.gpu import part_sparse as entries
from bench.gpu import sanitizer
from bench.gpu.common import Row, Run
from bench.gpu.part_operators import Case
from bench.machine import ROOT
from fastpeft.ops import khatri_rao_triton, kron_triton, sparse_cuda, sparse_triton

CASES = {
    "kron": [(33, (5, 7, 8, 5), "plain"), (3, (3, 131, 9, 67), "sliced")],
    "hadamard": [(33, (40, 35, 3), "plain"), (9, (75, 70, 12), "sliced")],
}


def run_operators(device: str, dtype: torch.dtype) -> int:
    """How many ran."""
    count = 0
    for family, code in (("kron", kron_triton), ("hadamard", khatri_rao_triton)):
        for tokens, size, layout in CASES[family]:
            m = whole.make(Case(family, tokens, size, dtype, torch.float32, layout), device)
            for operator in whole.OPERATORS.values():
                operator(m, code)
                count += 1
    cuda = device.startswith("cuda") and sparse_cuda.built()
    codes = [(sparse_triton, entries.TRITON)] + ([(sparse_cuda, entries.CUDA)] if cuda else [])
    for code, gradients in codes:
        for layout in ("plain", "padded"):
            m = entries.make(Case("sparse", 33, (75, 70, 500), dtype, torch.float32, layout), device)
            for gradient in gradients.values():
                gradient(m.dz, m.x, m.index)
            for scatter in entries.SCATTERS.values():
                scatter(m, code)
            if code is sparse_cuda:
                entries.gather(m)
            count += len(gradients) + len(entries.SCATTERS) + (code is sparse_cuda)
    return count


def sanitized(run: Run, tool: str) -> Row:
    """This module under compute-sanitizer's `tool`, or under "none", which fills Triton's cache.

    Without torch's memory pool, so that a step past a tensor leaves an allocation.
    """
    command = [sys.executable, "-m", "bench.gpu.tiny_parts", "--device", run.device]
    if tool != "none":
        binary = sanitizer.find()
        if not run.cuda:
            return {"skipped": "CUDA only"}
        if binary is None:
            return {"skipped": "compute-sanitizer is not installed"}
        code = str(sanitizer.ERROR)
        command = [binary, "--tool", tool, "--error-exitcode", code, "--target-processes", "all", *command]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=sanitizer.SECONDS
    )
    text, right = (done.stdout + done.stderr).strip().splitlines(), done.returncode == 0
    return {"right": right, "wrong": "" if right else "; ".join(text[-6:])}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    cuda = args.device.startswith("cuda")
    print(f"{run_operators(args.device, torch.bfloat16 if cuda else torch.float16)} operators ran")
    if cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
