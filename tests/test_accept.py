"""The slow rest, run by `make accept`: the main job over three seeds, and an install without a compiler."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.accept

ROOT = Path(__file__).parent.parent


def test_the_main_job_learns_and_equals_peft_over_three_seeds(tmp_path: Path) -> None:
    """Far above the most frequent class, and PEFT's accuracy within the sampling error of the evaluation set."""
    command = [sys.executable, "-m", "fastpeft", "finetune", "--seeds", "0", "1", "2", "--output", str(tmp_path)]
    subprocess.run(command, check=True, timeout=3000)
    report = json.loads((tmp_path / "report.json").read_text())
    n, majority = report["data"]["evaluation"], report["data"]["majority_accuracy"]
    accuracy = {arm["name"]: arm["accuracy_after"] for arm in report["arms"]}
    ours, theirs = accuracy["fastpeft"], accuracy["peft"]
    error = math.sqrt(ours * (1 - ours) / n)
    assert ours - 5 * error > majority
    assert ours - accuracy["frozen"] > 0
    assert abs(ours - theirs) <= 2 * error
    assert report["reload"]["fastpeft"] == 0.0 and report["reload"]["peft"] <= 1e-5 * report["reload"]["scale"]


def wheel(folder: Path, **environment: str) -> zipfile.ZipFile:
    """A wheel of a copy of the sources: an earlier build's files must not find their way into it."""
    copy = folder / "source"
    built = shutil.ignore_patterns("build", ".*", "*.so", "*.egg-info", "__pycache__", "tests", "fastpeft-finetune")
    shutil.copytree(ROOT, copy, ignore=built)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(copy)]
    subprocess.run(command, check=True, env=os.environ | environment, cwd=folder)
    return zipfile.ZipFile(next(folder.glob("fastpeft-*.whl")))


def test_a_wheel_holds_every_package_and_the_extension(tmp_path: Path) -> None:
    names = wheel(tmp_path).namelist()
    for path in (ROOT / "fastpeft").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in names
    assert "fastpeft/triton_kernels/__init__.py" in names and not any(n.startswith("triton_kernels/") for n in names)
    assert any(n.startswith("fastpeft/_C.") for n in names)


def test_without_a_compiler_it_installs_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    archive = wheel(tmp_path, PATH=str(tmp_path / "empty"), CXX="")
    assert not any("_C." in n for n in archive.namelist())
    archive.extractall(tmp_path / "site")
    # the environment's own editable install would lend its extension to the unpacked wheel
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]; "
        "import fastpeft, fastpeft.env; print(fastpeft.__file__); print(fastpeft.env.describe())"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    out = subprocess.run([sys.executable, "-P", "-c", code], check=True, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert str(tmp_path) in out.stdout and "no C++ compiler" in out.stdout
