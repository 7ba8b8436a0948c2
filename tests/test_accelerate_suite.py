"""PEFT's own tests with every model accelerated: the same outcomes as without (bench.peft_suite), and a suite that can fail."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import peft_suite

# fewest fused forwards of each family in the whole file; a green run in which nothing was fused would show nothing
LEAST = {"lora": 800, "dora": 350, "adalora": 150, "loha": 400, "lokr": 550, "shira": 250}


@pytest.fixture(scope="module")
def tests_of_peft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    try:
        return peft_suite.unpack(peft_suite.sdist(folder, importlib.metadata.version("peft")), folder)
    except peft_suite.NoSdist as error:
        pytest.skip(str(error))


@pytest.mark.accept
def test_the_same_outcomes(tests_of_peft):
    result = peft_suite.suite(tests_of_peft)
    assert not result["differ"], peft_suite.show(result)
    assert result["outcomes"]["accelerated"]["passed"] > 15000
    assert all(result["fused"].get(family, 0) >= least for family, least in LEAST.items()), peft_suite.show(result)


def test_a_difference_is_seen():
    stock, ours = {"a": "passed", "b": "failed", "c": "skipped"}, {"a": "failed", "b": "failed", "d": "passed"}
    want = {"a": ("passed", "failed"), "c": ("skipped", "absent"), "d": ("absent", "passed")}
    assert peft_suite.differences(stock, ours) == want


def test_no_sdist_says_so(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="trying\nno such file")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(peft_suite.NoSdist, match=r"peft==0\.1: no such file; give --sdist PATH"):
        peft_suite.sdist(tmp_path, "0.1")
    assert peft_suite.main([]) == 2
