"""PEFT's own tests/test_custom_models.py, unchanged, with stock PEFT and with every model accelerated: the same outcomes?

    python -m bench.peft_suite [--sdist PATH] [-k EXPRESSION] [--file test_custom_models.py] [--save]

PATH: PEFT's source distribution; without it pip downloads the installed version's. Prints what differs, the counts of outcomes,
fused forwards by family and the reasons of those that PEFT computed. Exit status 1 if an outcome differs, or if a family that
these tests have was never fused: a green run in which nothing was fused shows nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "peft-suite.json"
FAMILIES = ("lora", "dora", "adalora", "loha", "lokr", "shira")
ARMS = ("stock", "accelerated")


class NoSdist(RuntimeError):
    """PEFT's source distribution could not be had."""


def sdist(folder: Path, version: str) -> Path:
    """Download PEFT's source distribution into a folder. NoSdist with pip's last line if that fails."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "--no-build-isolation",
               "-d", str(folder), f"peft=={version}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    found = sorted(folder.glob("peft-*.tar.gz"))
    if done.returncode or not found:
        lines = done.stderr.strip().splitlines()
        raise NoSdist(f"pip could not download peft=={version}: {lines[-1] if lines else 'no message'}; give --sdist PATH.")
    return found[0]


def unpack(archive: Path, folder: Path) -> Path:
    """PEFT's tests below `folder`, as the package `tests`; returns the folder that holds it."""
    with tarfile.open(archive) as tar:
        inside = [m for m in tar.getmembers() if "/tests/" in m.name and m.isfile()]
        tar.extractall(folder, members=inside, filter="data")
    (root,) = [p for p in folder.iterdir() if (p / "tests").is_dir()]
    (root / "tests" / "__init__.py").touch()
    return root


def run(arm: str, root: Path, file: str, keyword: str | None) -> dict[str, Any]:
    """Outcomes and counts of one arm, in a process of its own."""
    out = root / f"{arm}.json"
    out.unlink(missing_ok=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"FASTPEFT_SUITE": arm, "FASTPEFT_SUITE_OUT": str(out), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", f"tests/{file}", "-q", "-p", "bench.peft_plugin", "-p", "no:cacheprovider",
               "-W", "ignore", "--tb=short", "--no-header", *(["-k", keyword] if keyword else [])]  # fmt: skip
    start = time.monotonic()
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if not out.exists():
        raise RuntimeError(f"{arm}: pytest wrote no outcomes\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    found = json.loads(out.read_text())
    if not found["outcomes"]:
        raise RuntimeError(f"{arm}: no test ran\n{done.stdout[-3000:]}")
    return found | {"seconds": round(time.monotonic() - start)}


def differences(stock: dict[str, str], accelerated: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Test -> its two outcomes, of those whose outcomes differ."""
    names = sorted(stock.keys() | accelerated.keys())
    both = {n: (stock.get(n, "absent"), accelerated.get(n, "absent")) for n in names}
    return {n: pair for n, pair in both.items() if pair[0] != pair[1]}


def suite(root: Path, file: str = "test_custom_models.py", keyword: str | None = None) -> dict[str, Any]:
    """Both arms and what differs; `root` holds the package `tests`."""
    with ThreadPoolExecutor(len(ARMS)) as pool:  # each is a process of one thread
        found = dict(zip(ARMS, pool.map(lambda arm: run(arm, root, file, keyword), ARMS), strict=True))
    stock, ours = (found[arm]["outcomes"] for arm in ARMS)
    return {
        "peft": importlib.metadata.version("peft"),
        "file": file,
        "keyword": keyword,
        "outcomes": {arm: dict(Counter(found[arm]["outcomes"].values())) for arm in ARMS},
        "failed": sorted(n for n, o in stock.items() if o == "failed"),
        "differ": differences(stock, ours),
        "seconds": {arm: found[arm]["seconds"] for arm in ARMS},
        "fused": found["accelerated"]["fused"],
        "peft_forwards": found["accelerated"]["peft"],
    }


def show(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"PEFT {result['peft']}, tests/{result['file']}" + (f" -k {result['keyword']!r}" if result["keyword"] else "")]
    for arm in ARMS:
        counts = ", ".join(f"{n} {o}" for o, n in sorted(result["outcomes"][arm].items()))
        lines.append(f"  {arm:12s} {counts}  ({result['seconds'][arm]} s)")
    lines.append(f"{len(result['differ'])} outcomes differ")
    lines += [f"  {name}: {a} -> {b}" for name, (a, b) in list(result["differ"].items())[:40]]
    lines.append("fused forwards: " + ", ".join(f"{k} {v}" for k, v in sorted(result["fused"].items())))
    lines.append("forwards of accelerated layers that PEFT computed:")
    lines += [f"  {n:7d}  {cls.removeprefix('peft.tuners.')}: {reason}" for n, cls, reason in result["peft_forwards"]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peft_suite", description=__doc__.split("\n\n")[0])
    parser.add_argument("--sdist", type=Path)
    parser.add_argument("--file", default="test_custom_models.py")
    parser.add_argument("-k", dest="keyword")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            archive = args.sdist or sdist(Path(folder), importlib.metadata.version("peft"))
        except NoSdist as error:
            print(error, file=sys.stderr)
            return 2
        result = suite(unpack(archive, Path(folder)), args.file, args.keyword)
    print(show(result))
    if args.save:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    idle = [f for f in FAMILIES if not result["fused"].get(f)] if args.keyword is None and args.file == parser.get_default("file") else []
    if idle:
        print(f"never fused: {', '.join(idle)}")
    return int(bool(result["differ"] or idle))


if __name__ == "__main__":
    raise SystemExit(main())
