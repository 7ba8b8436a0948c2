"""A pytest plugin for PEFT's own tests: outcomes to a file, no hub, and with FASTPEFT_SUITE=accelerated every model accelerated.

    python -m pytest -p bench.peft_plugin ...       in a folder with PEFT's `tests`, as `python -m bench.peft_suite` makes it

Accelerating is one wrapper in this process around the method through which PEFT makes every adapter layer; the library itself
patches nothing. FASTPEFT_SUITE_OUT names the file: outcomes by test, fused forwards by family, PEFT's own by class and reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_RANK = {"passed": 0, "skipped": 1, "failed": 2}
_outcomes: dict[str, str] = {}


def pytest_configure(config: pytest.Config) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, os.getcwd())
    if importlib.util.find_spec("diffusers") is None:
        # PEFT's test modules import one name of it, for models that none of these tests has
        sys.modules["diffusers"] = stand_in = types.ModuleType("diffusers")
        stand_in.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    import tests.testing_utils as utils

    utils.hub_online_once = _nothing  # sets HF_HUB_OFFLINE back
    if os.environ.get("FASTPEFT_SUITE") == "accelerated":
        accelerate_everything()


@contextlib.contextmanager
def _nothing(model_id: str) -> Iterator[None]:
    yield


def accelerate_everything() -> None:
    """After PEFT has put an adapter into a model, accelerate the model."""
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    import fastpeft

    inject = BaseTuner.inject_adapter

    @functools.wraps(inject)
    def wrapped(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = inject(self, model, *args, **kwargs)
        if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
            fastpeft.accelerate(model)
        return result

    BaseTuner.inject_adapter = wrapped


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
    before = _outcomes.get(report.nodeid, "passed")
    if _RANK.get(outcome, 1) >= _RANK.get(before, 1):
        _outcomes[report.nodeid] = outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    from fastpeft.accelerated import fused_calls, peft_calls

    calls = sorted(((n, *key) for key, n in peft_calls().items()), reverse=True)
    found = {"outcomes": _outcomes, "fused": fused_calls(), "peft": calls}
    Path(os.environ["FASTPEFT_SUITE_OUT"]).write_text(json.dumps(found))
