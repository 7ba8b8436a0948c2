"""The sparse CUDA kernels: what nvcc makes of them for each architecture, and what their wrappers refuse. None of it runs here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpeft.ops import sparse_cuda

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {"columns_kernel": 3, "grad_kernel": 6, "gather_kernel": 3, "put_kernel": 3, "restore_kernel": 2}


@pytest.fixture(scope="module")
def setup_py():
    """The functions of setup.py that choose compilers and architectures, without its call of setup()."""
    source = (ROOT / "setup.py").read_text().partition("\nsetup(\n")[0]
    names = {"__file__": str(ROOT / "setup.py"), "__name__": "setup_of_fastpeft"}
    exec(compile(source, "setup.py", "exec"), names)
    return names


@pytest.mark.parametrize("arch", ["80", "90a", "100"])
def test_no_kernel_spills(arch, tmp_path, setup_py):
    cuda = setup_py["nvcc"]()
    if cuda is None:
        pytest.skip("nvcc is neither named by $NVCC nor on the path nor in $CUDA_HOME")
    if arch not in setup_py["architectures"](cuda):
        pytest.skip(f"this nvcc does not know sm_{arch}")
    command = [cuda, "-O3", "-std=c++17", "-fmad=false", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v", "-c"]
    command += [str(ROOT / "csrc/sparse/sparse.cu"), "-o", str(tmp_path / "sparse.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    compiled = re.findall(r"Compiling entry function '(\S+)'", done.stderr)
    assert {name: sum(name in c for c in compiled) for name in KERNELS} == KERNELS
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) == len(compiled) == sum(KERNELS.values())
    assert set(spills) == {("0", "0")}, done.stderr


def test_the_module_holds_them_where_it_was_built_with_cuda():
    info = sparse_cuda._EXTENSION.build_info() if sparse_cuda._EXTENSION is not None else {"cuda_sources": ""}
    assert sparse_cuda.built() == ("csrc/sparse/sparse.cu" in info["cuda_sources"].split())


def test_nothing_imports_the_wrappers_that_were_never_run():
    """Until they have been measured, only this test names them."""
    users = [
        f.relative_to(ROOT).as_posix()
        for folder in ("fastpeft", "triton_kernels")
        for f in (ROOT / folder).rglob("*.py")
        if f.name != "sparse_cuda.py" and "sparse_cuda" in f.read_text()
    ]
    assert users == []
    code = "import fastpeft, sys; assert not any('sparse_cuda' in m for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_arguments_that_do_not_fit_are_refused():
    index, values = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32), torch.ones(2)
    x, y, W = torch.zeros(6, 5), torch.zeros(6, 4), torch.zeros(4, 5)
    calls = {
        "index is .* in torch.int64": lambda: sparse_cuda.grad(y, x, index.long()),
        r"index is \(3, 2\)": lambda: sparse_cuda.put(W, values, torch.zeros(3, 2, dtype=torch.int32)),
        "x is .* in torch.float64": lambda: sparse_cuda.grad(y, x.double(), index),
        "x is .* with strides": lambda: sparse_cuda.grad(y, torch.zeros(5, 6).T, index),
        r"chunk is \(4,\)": lambda: sparse_cuda.gather(values, y[0], index, 0, 0, 2),
        r"out is \(1,\)": lambda: sparse_cuda.gather(values[:1], W, index, 0, 0, 2),
        r"values is \(1,\)": lambda: sparse_cuda.put(W, values[:1], index),
        "saved is .* in torch.float32 for 2 entries": lambda: sparse_cuda.restore(W.half(), index, values),
        "W on cpu.*on the CPU use fastpeft.ops.sparse_cpu": lambda: sparse_cuda.copy(W, values, index, W.clone()),
        "x on cpu": lambda: sparse_cuda.grad(y, x, index),
        "index on cpu, x on meta": lambda: sparse_cuda._check("grad", index, {"x": x.to("meta")}),
    }
    for match, call in calls.items():
        with pytest.raises(ValueError, match=match):
            call()
