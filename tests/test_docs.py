"""The documents say what is true: the kernel table, commands, links and the example method."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastpeft

ROOT = Path(__file__).resolve().parent.parent
DOCS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "METHODS.md",
    "docs/API.md",
    "docs/DESIGN.md",
    "docs/KERNELS.md",
    "docs/MATRIX.md",
    "docs/MIGRATION.md",
    "docs/STATUS.md",
    "docs/TROUBLESHOOTING.md",
    "bench/README.md",
    "bench/BEHAVIOUR.md",
    "bench/GPU_QUEUE.md",
]
COLUMNS = ["Triton", "CUDA/C++", "torch", "interpreter", "compile gate", "measured on a GPU"]
# file stem of the path, the key of its GPU rows, and what its torch code must define
PATHS = {
    "base+LoRA matmul": ("lowrank", r"def up_add\("),
    "MELoRA block-diagonal": ("lowrank", r"blocks: int"),
    "DoRA norm": ("rownorm|dora", r"def row_sq_norm\("),
    "Kronecker": ("kron", r"def product\("),
    "Hadamard": ("hadamard|khatri_rao", r"def back_dense\("),
    "RoSA sparse": ("sparse", r"def grad_by_entry\("),
    "Grouped experts": ("grouped", r"def segments\("),
    "NF4 and int8 weights": ("nf4|quant", r"def fill_torch\("),
}
FOLDERS = {
    "Triton": ["triton_kernels"],
    "CUDA/C++": ["csrc"],
    "torch": ["fastpeft/ops"],
    "interpreter": ["tests"],
    "compile gate": ["tests"],
}
MARKERS = {
    "Triton": r"@triton\.jit",
    "CUDA/C++": r"__global__|pybind11|namespace fastpeft",
    "interpreter": r"in Triton's interpreter",
    "compile gate": r"GPUTarget",
    "measured on a GPU": r'"device": ?"cuda',
}


def table() -> dict[str, dict[str, str]]:
    lines = [s for s in (ROOT / "docs/KERNELS.md").read_text().splitlines() if s.startswith("|")]
    rows = [[c.strip() for c in s.strip("|").split("|")] for s in lines]
    assert rows[0][1:] == COLUMNS
    return {r[0]: dict(zip(COLUMNS, r[1:], strict=True)) for r in rows[2:]}


def found(path: str, column: str, root: Path = ROOT) -> list[str]:
    """Files that make a `no` in this cell untrue."""
    stem, marker = PATHS[path][0], MARKERS.get(column, PATHS[path][1])
    if column == "measured on a GPU":
        files = sorted((root / "bench/results").rglob("*.json*"))
        return [str(f) for f in files if re.search(marker, f.read_text()) and re.search(stem, f.read_text())]
    hits = []
    for folder in FOLDERS[column]:
        for f in sorted((root / folder).rglob("*")):
            if f.suffix not in (".py", ".cpp", ".cu", ".h") or not re.search(
                rf"(^|_|/)({stem})", f.relative_to(root).as_posix()
            ):
                continue
            if re.search(marker, f.read_text()):
                hits.append(f.relative_to(root).as_posix())
    return hits


def test_the_table_has_every_hot_path():
    assert list(table()) == list(PATHS)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("path", PATHS)
def test_cell(path, column):
    cell = table()[path][column]
    if cell == "no":
        assert found(path, column) == []
        return
    assert cell.startswith("yes: "), f"{path} / {column}: {cell!r} is neither `no` nor `yes: <file>`"
    f = ROOT / cell.removeprefix("yes: ")
    assert f.is_file(), f
    assert re.search(MARKERS.get(column, PATHS[path][1]), f.read_text()), (
        f"{f} holds nothing for {path} / {column}"
    )


def test_an_unlisted_kernel_is_noticed(tmp_path):
    (tmp_path / "triton_kernels").mkdir()
    (tmp_path / "triton_kernels/kron.py").write_text("@triton.jit\ndef kron(): ...")
    assert found("Kronecker", "Triton", tmp_path) == ["triton_kernels/kron.py"]


def test_readme_commands_are_targets():
    made = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.M)
    assert made == ["finetune", "test"]
    for name in made:
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.M)


def test_readme_first_screen():
    """The two commands come before everything but the line that says what it is for; the count of methods is right."""
    text = (ROOT / "README.md").read_text()
    assert text.index("fastpeft.adapt(model") < text.index("make finetune") < text.index("make test") < text.index("![") < text.index("\n## ")
    count = len(fastpeft.methods())
    assert "LoRA and thirty-five other" in text and count == 36, f"there are {count} methods; say so in the README"


def test_numerics_heading():
    assert re.search(r"^#+ Numerics$", (ROOT / "CHANGELOG.md").read_text(), re.M)


@pytest.mark.parametrize("name", DOCS)
def test_links_resolve(name):
    f = ROOT / name
    for target in re.findall(r"\]\(([^)#\s]+)", f.read_text()):
        assert target.startswith("https://") or (f.parent / target).exists(), f"{name}: {target}"


_EXAMPLE = """
import json, sys, types
import fastpeft, torch
name = "fastpeft.method.example_diagonal"
module = sys.modules[name] = types.ModuleType(name)
exec(compile(sys.argv[1], name, "exec"), module.__dict__)
found = {m.name: m.mergeable for m in fastpeft.methods()}
model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 4))
fastpeft.adapt(model, "example_diagonal", target_modules=["0"], rank=2)
model(torch.randn(3, 16)).sum().backward()
print(json.dumps(found))
"""


def test_example_method_registers():
    code = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S).group(1)
    assert len(code.splitlines()) < 80
    done = subprocess.run([sys.executable, "-c", _EXAMPLE, code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["example_diagonal"] is True
