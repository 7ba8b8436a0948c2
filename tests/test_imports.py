"""The import graph, read from the sources, and what importing the package costs and changes."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastpeft"


def imports(path: Path, top_only=False) -> set[str]:
    """Dotted names a file imports: `from a.b import c` gives a.b, and a.b.c where that is a module of this repository."""
    tree, found = ast.parse(path.read_text()), set()
    for node in _top_level(tree) if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            inner = {f"{module}.{a.name}" for a in node.names}
            modules = {n for n in inner if _is_module(n)}
            found |= modules
            if len(modules) < len(inner):
                found.add(module)
    return {n for n in found if n.split(".")[0] not in sys.stdlib_module_names}


def _top_level(tree):
    """Statements that run on import: everything outside function bodies and `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _top_level(node)


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists() or name == "fastpeft._C"


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.py"))


def test_the_reader_sees_imports():
    assert {"torch", "fastpeft.registry", "fastpeft.method.lora"} <= imports(PACKAGE / "method" / "dora.py")


@pytest.mark.parametrize("path", files(PACKAGE / "method"), ids=lambda p: p.name)
def test_methods_see_only_the_registry_terms_and_supports(path):
    allowed = ("torch", "fastpeft.registry", "fastpeft.option_checks", "fastpeft.terms", "fastpeft.term_checks", "fastpeft.support", "fastpeft.overlay", "fastpeft.method",
               "fastpeft.start", "fastpeft.fold", "fastpeft.groups", "fastpeft.shared", "fastpeft.stack",
               "fastpeft.routing", "fastpeft.patterns", "fastpeft.grouping")  # fmt: skip
    assert not [n for n in imports(path) if not within(n, allowed)]


@pytest.mark.parametrize("name", ["fastfood.py", "fold.py", "groups.py", "shared.py"])
def test_folds_see_no_method(name):
    allowed = ("torch", "fastpeft.ops", "fastpeft.registry", "fastpeft.option_checks", "fastpeft.terms", "fastpeft.support", "fastpeft.fastfood", "fastpeft.fold",
               "fastpeft.shared")  # fmt: skip
    assert not [n for n in imports(PACKAGE / name) if not within(n, allowed)]


@pytest.mark.parametrize("path", files(PACKAGE / "start"), ids=lambda p: p.name)
def test_starts_see_bases_and_no_method(path):
    allowed = ("torch", "fastpeft.registry", "fastpeft.option_checks", "fastpeft.base", "fastpeft.quantised", "fastpeft.stored", "fastpeft.start")
    assert not [n for n in imports(path) if not within(n, allowed)]


@pytest.mark.parametrize("path", files(PACKAGE / "ops"), ids=lambda p: p.name)
def test_ops_see_no_policy(path):
    allowed = ("torch", "numpy", "triton", "triton_kernels", "fastpeft.ops", "fastpeft._C")
    assert not [n for n in imports(path) if not within(n, allowed)]
    assert not [n for n in imports(path, top_only=True) if within(n, ("triton", "triton_kernels"))]


def test_terms_import_only_torch():
    assert imports(PACKAGE / "terms.py") == {"torch"}
    assert all(within(n, ("torch", "fastpeft.terms")) for n in imports(PACKAGE / "term_checks.py"))


@pytest.mark.parametrize("path", files(PACKAGE), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_huggingface_is_imported_late(path):
    """transformers and peft are optional: outside fastpeft/integrations no module imports them at its top."""
    if PACKAGE / "integrations" not in path.parents:
        assert not [n for n in imports(path, top_only=True) if within(n, ("transformers", "peft", "datasets", "accelerate"))]


def test_kernels_know_nothing_of_the_package():
    for path in files(ROOT / "triton_kernels"):
        assert not [n for n in imports(path) if within(n, ("fastpeft",))], path


def within(name: str, packages) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_without_triton_is_quick():
    """0.5 s of the processor is the budget a command-line tool can add to torch's own start; the best of three, as machines stall."""
    code = """
        import sys, time
        sys.modules["triton"] = None
        import torch
        start = time.process_time()
        import fastpeft
        print(time.process_time() - start)
        assert not {"transformers", "peft", "datasets"} & set(sys.modules)
    """
    assert min(float(fresh(code)) for _ in range(3)) < 0.5


def test_works_without_triton():
    fresh("""
        import sys
        sys.modules["triton"] = None
        import torch, fastpeft
        layer = fastpeft.AdaptedLinear(8, 6, method="dora", rank=2, dropout=0.1)
        layer(torch.randn(3, 8)).sum().backward()
        assert layer.adapter.dora.A.grad is not None
    """)


def test_import_changes_nothing_in_torch():
    fresh("""
        import torch
        from torch import nn
        snapshot = lambda: [(c, dict(c.__dict__)) for c in (nn.Module, nn.Linear, nn.MultiheadAttention, torch.Tensor)]
        state = lambda: (torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state().tolist(), torch.is_grad_enabled())
        before, was = snapshot(), state()
        import fastpeft
        fastpeft.methods()
        assert snapshot() == before and state() == was
    """)
