"""DeepSpeed's ZeRO-2 and ZeRO-3 through Accelerate, in two processes on the CPU: the losses of one process with all rows."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed_runs import METHODS, STAGES, train
from sharded import RANKS, Tower
from tolerance import assert_as_good

import fastpeft

pytestmark = pytest.mark.accept

HERE = Path(__file__).parent
# make accept puts it into a folder of its own: beside Transformers and Accelerate it would change what they import
FOLDER = Path(sys.prefix) / "deepspeed"
every = [(stage, case) for stage in STAGES for case in METHODS]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    if not (FOLDER / "deepspeed").is_dir() and importlib.util.find_spec("deepspeed") is None:
        pytest.skip(f"DeepSpeed is neither installed nor in {FOLDER}; make accept puts it there.")
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(HERE.parent), str(HERE), str(FOLDER), os.environ.get("PYTHONPATH", "")])
    own = os.environ | {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "OMP_NUM_THREADS": "1"}
    logs = [folder / f"{rank}.log" for rank in range(RANKS)]
    runs = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(HERE / "deepspeed_runs.py"), str(rank), str(folder), port]
        runs.append(subprocess.Popen(command, env=own, cwd=folder, stdout=log.open("w"), stderr=subprocess.STDOUT))
    try:
        codes = [run.wait(timeout=900) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert codes == [0] * RANKS, "\n".join(log.read_text()[-4000:] for log in logs)
    return folder, [torch.load(folder / str(rank)) for rank in range(RANKS)]


@pytest.mark.parametrize(("stage", "case"), every)
def test_losses_are_those_of_the_joined_batch(stage, case, ranks):
    truth, exact, _ = train(case, torch.float64)
    plain, model, _ = train(case, torch.float32)
    alone, _, _ = train(case, torch.float32, shares=(0,))
    folder, seen = ranks
    for rank in seen:
        got = rank[stage, case]
        assert got["engine"] == "DeepSpeedEngine"
        assert "DeepSpeed keeps gradients and parameters to itself" in got["attach"]
        assert_as_good(got["losses"], truth, plain, f"losses of {case} under ZeRO-{stage}")
        with pytest.raises(AssertionError, match="error"):
            assert_as_good(alone, truth, plain)
        # every parameter was in parts, frozen ones too; or none was
        assert got["partitioned"] == (sorted(n for n, _ in model.named_parameters()) if stage == 3 else [])
    whole = Tower(torch.float32)
    whole.load_state_dict({n: t for n, t in model.state_dict().items() if "adapter" not in n})
    fastpeft.load_adapter(whole, folder / f"{stage}-{case}")
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    flat = lambda m: torch.cat([m.get_parameter(n).detach().flatten() for n in names])  # noqa: E731
    # all of them at once: AdamW steps as far along a gradient of the size of rounding as along any other
    assert_as_good(flat(whole), flat(exact), flat(model), f"parameters of {case} under ZeRO-{stage}")


@pytest.mark.parametrize("case", METHODS)
def test_loads_into_partitioned_parameters(case, ranks):
    for rank in ranks[1]:
        assert rank[3, case]["loaded"]
