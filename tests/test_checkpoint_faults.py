"""save_adapter, load_adapter, export_lora: round trips, refusals that change nothing, interrupted saves."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastpeft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY_A = "base_model.model.body.0.lora_A.weight"


class Net(nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """Moves everything that trains, so that no value is what a fresh adapt would give."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def adapted(method: Any = "lora", seed: int = 1, **options: Any) -> nn.Module:
    model = Net()
    fastpeft.adapt(model, method, **({"rank": 2, "alpha": 3, "target_modules": ["body.0", "body.2"]} | options))
    return shaken(model, seed)


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, type], dict[str, bool]]:
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        {n: type(m) for n, m in model.named_modules()},
        {n: p.requires_grad for n, p in model.named_parameters()},
    )


def assert_untouched(model: nn.Module, before: tuple[dict[str, Tensor], dict[str, type], dict[str, bool]]) -> None:
    state, classes, flags = snapshot(model)
    assert classes == before[1] and flags == before[2] and state.keys() == before[0].keys()
    for key, value in state.items():
        assert torch.equal(value, before[0][key]), key


def assert_same_output(a: nn.Module, b: nn.Module, rtol: float = 0.0) -> None:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(a.eval()(x), b.eval()(x), rtol=rtol, atol=rtol)


CASES = {
    "lora": {},
    "dora": {"method": "dora"},
    "rslora": {"rslora": True},
    "lora_bias": {"lora_bias": True},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["head", "norm"]},
    "patterns": {"rank_pattern": {"body.2": 4}, "alpha_pattern": {"body.2": 7}},
    "dora_full": {"method": "dora", "grad": "full"},
    "melora": {"method": "melora", "target_modules": ["body.0"]},
    "two_methods": {"method": ["lora", "dora"]},
}


@pytest.mark.parametrize("case", CASES)
def test_round_trip_on_a_fresh_model(case: str, tmp_path: Path) -> None:
    source = adapted(**CASES[case])
    fastpeft.save_adapter(source, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    fresh = Net()
    state = torch.random.get_rng_state()
    report = fastpeft.load_adapter(fresh, tmp_path)
    assert torch.equal(state, torch.random.get_rng_state())
    assert report.adapted and report.trainable == sum(p.numel() for p in source.parameters() if p.requires_grad)
    assert snapshot(fresh)[1:] == snapshot(source)[1:]
    for key, value in source.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key
    assert_same_output(source, fresh)
    fastpeft.unload(fresh)
    assert_untouched(fresh, snapshot(Net()))


def test_load_into_an_adapted_model_with_the_same_options(tmp_path: Path) -> None:
    source = adapted(seed=1)
    fastpeft.save_adapter(source, tmp_path)
    other = adapted(seed=2)
    fastpeft.load_adapter(other, tmp_path)
    assert_same_output(source, other)


def test_suffix_clash_is_written_as_an_anchored_regex(tmp_path: Path) -> None:
    model = nn.ModuleDict({"lin": nn.Linear(4, 4), "deep": nn.ModuleDict({"lin": nn.Linear(4, 4)})})
    fastpeft.adapt(model, "lora", rank=2, target_modules=r"^lin$")
    fastpeft.save_adapter(model, tmp_path)
    fresh = nn.ModuleDict({"lin": nn.Linear(4, 4), "deep": nn.ModuleDict({"lin": nn.Linear(4, 4)})})
    assert fastpeft.load_adapter(fresh, tmp_path).adapted == ["lin"]


def test_save_needs_an_adapted_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not adapted"):
        fastpeft.save_adapter(Net(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_values_that_are_not_finite_are_saved_with_a_warning(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        model.get_parameter("body.0.adapter.lora.A")[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="finite"):
        fastpeft.save_adapter(model, tmp_path)
    assert (tmp_path / WEIGHTS).is_file()


# ---- bad input: (how the folder is damaged, the error, a word of its message)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    """As a file of PEFT's: without the embedded config, so that the field itself is judged and not the mismatch."""

    def act(folder: Path) -> None:
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"format": "pt"})
        config = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps(config))

    return act


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        with safe_open(folder / WEIGHTS, "pt") as file:
            header = file.metadata()
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, header)

    return act


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def spoil(value: float) -> Callable[[dict[str, Tensor]], Any]:
    return lambda t: t[KEY_A].view(-1).__setitem__(3, value)


E = fastpeft.CheckpointError
BAD: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no_weights": (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, WEIGHTS),
    "no_config": (lambda f: (f / CONFIG).unlink(), FileNotFoundError, CONFIG),
    "pickle_only": (to_pickle, E, "convert"),
    "truncated": (cut, E, "truncated"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), E, "safetensors"),
    "garbage": (lambda f: (f / WEIGHTS).write_bytes(b"\x80\x02garbage" * 40), E, "safetensors"),
    "bad_json": (lambda f: (f / CONFIG).write_text('{"peft_type": '), E, "JSON"),
    "not_text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00{"), E, CONFIG),
    "json_list": (lambda f: (f / CONFIG).write_text("[1]"), E, "peft_type"),
    "bad_metadata": (
        lambda f: save_file(load_file(f / WEIGHTS), f / WEIGHTS, {"format": "pt", "fastpeft": "{"}), E, WEIGHTS,
    ),
    "metadata_list": (
        lambda f: save_file(load_file(f / WEIGHTS), f / WEIGHTS, {"format": "pt", "fastpeft": "[]"}), E, WEIGHTS,
    ),
    "mismatch": (
        lambda f: (f / CONFIG).write_text(json.dumps(json.loads((f / CONFIG).read_text()) | {"lora_alpha": 9})),
        E, "lora_alpha",
    ),
    "unknown_type": (edit_config(peft_type="NO_SUCH"), E, "NO_SUCH"),
    "unknown_type_lists_what_exists": (edit_config(peft_type="NO_SUCH"), E, "dora"),
    "missing_key": (edit_tensors(lambda t: t.pop(KEY_A)), E, "missing"),
    "unexpected_key": (edit_tensors(lambda t: t.update({"base_model.model.x": torch.ones(2)})), E, "unexpected"),
    "narrower_targets": (edit_config(target_modules=["body.0"]), E, "body.2"),
    "wrong_shape": (edit_tensors(lambda t: t.update({KEY_A: torch.ones(3, 12)})), E, "shape"),
    "transposed": (edit_tensors(lambda t: t.update({KEY_A: t[KEY_A].t().contiguous()})), E, "shape"),
    "nan": (edit_tensors(spoil(float("nan"))), E, "NaN"),
    "inf": (edit_tensors(spoil(float("inf"))), E, "Inf"),
    "integer": (edit_tensors(lambda t: t.update({KEY_A: torch.ones(2, 12, dtype=torch.int32)})), E, "dtype"),
    "mixed": (edit_tensors(lambda t: t.update({KEY_A: t[KEY_A].half()})), E, "dtype"),
    "fp64": (edit_tensors(lambda t: t.update({k: v.double() for k, v in t.items()})), E, "dtype"),
    "rank_zero": (edit_config(r=0), E, "rank"),
    "rank_text": (edit_config(r="two"), E, "rank"),
    "no_such_target": (edit_config(target_modules=["nowhere"]), E, "nowhere"),
    "bad_regex": (edit_config(target_modules="body.(0"), E, "target_modules"),
    **{
        f"feature_{k}": (edit_config(**{k: v}), E, k)
        for k, v in {
            "use_qalora": True,
            "layer_replication": [[0, 1]],
            "target_parameters": ["body.0.weight"],
            "trainable_token_indices": [1],
            "megatron_config": {"a": 1},
            "layers_to_transform": [0],
            "alora_invocation_tokens": [1],
            "ensure_weight_tying": True,
            "from_the_future": 3,
        }.items()
    },
}  # fmt: skip


EVERY = [(c, m) for c in BAD for m in ("fresh", "adapted")]


@pytest.mark.parametrize("case,model_is", EVERY)
def test_bad_input_raises_and_changes_nothing(case: str, model_is: str, tmp_path: Path) -> None:
    damage, error, word = BAD[case]
    fastpeft.save_adapter(adapted(seed=1), tmp_path)
    damage(tmp_path)
    model = Net() if model_is == "fresh" else adapted(seed=2)
    before = snapshot(model)
    with pytest.raises(error) as caught:
        fastpeft.load_adapter(model, tmp_path)
    assert word.lower() in str(caught.value).lower()
    assert_untouched(model, before)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        fastpeft.load_adapter(Net(), tmp_path / "nothing_here")


@pytest.mark.parametrize("other", [{"method": "dora"}, {"rank": 3}, {"alpha": 4}, {"rslora": True}, {"bias": "all"},
                                   {"target_modules": ["body.0"]}, {"modules_to_save": ["head"]}])  # fmt: skip
def test_an_adapted_model_must_match(other: dict[str, Any], tmp_path: Path) -> None:
    fastpeft.save_adapter(adapted(), tmp_path)
    model = adapted(**other, seed=2)
    before = snapshot(model)
    with pytest.raises(E):
        fastpeft.load_adapter(model, tmp_path)
    assert_untouched(model, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_uniform_16_bit_file_is_widened(dtype: torch.dtype, tmp_path: Path) -> None:
    fastpeft.save_adapter(adapted(), tmp_path)
    edit_tensors(lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))(tmp_path)
    model = Net()
    fastpeft.load_adapter(model, tmp_path)
    A = model.get_parameter("body.0.adapter.lora.A")
    assert A.dtype == torch.float32 and torch.equal(A, load_file(tmp_path / WEIGHTS)[KEY_A].float())


# ---- interruption


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "call,nth",
    [(call, nth) for call in ("write", "fsync", "replace") for nth in (1, 2)],
)
def test_a_kill_leaves_the_old_or_the_new(call: str, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the save that came before was killed too: its leftovers must not make both unreadable."""
    old, new, last = adapted(seed=1), adapted(seed=2, alpha=5), adapted(seed=3, alpha=7)
    fastpeft.save_adapter(old, tmp_path)
    interrupted(new, tmp_path, monkeypatch, "replace", 2)
    interrupted(last, tmp_path, monkeypatch, "fsync" if call == "write" else call, nth, partial=call == "write")
    fresh = Net()
    fastpeft.load_adapter(fresh, tmp_path)
    values = [m.state_dict() for m in (old, new, last)]
    assert any(all(torch.equal(v, fresh.state_dict()[k]) for k, v in state.items()) for state in values)
    fastpeft.save_adapter(last, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    fastpeft.load_adapter(again := Net(), tmp_path)
    assert_same_output(last, again)


def interrupted(model: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, nth: int, partial: bool = False) -> None:
    """A save whose nth os.replace or os.fsync does not happen; with partial, half a file is on disk then.

    Every later removal of files is switched off: a process that was killed cleans nothing up.
    """
    real, count = getattr(os, call), 0

    def stop(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count < nth:
            return real(*args, **kwargs)
        if partial:
            os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, call, stop)
        patch.setattr(os, "unlink", lambda *a, **k: None)
        patch.setattr(Path, "unlink", lambda *a, **k: None)
        with pytest.raises(Killed):
            fastpeft.save_adapter(model, folder)


def test_an_error_at_the_first_rename_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = adapted(seed=1)
    fastpeft.save_adapter(old, tmp_path)

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(os, "replace", fail)
        fastpeft.save_adapter(adapted(seed=2, alpha=5), tmp_path)
    fastpeft.load_adapter(fresh := Net(), tmp_path)
    assert_same_output(old, fresh)


# ---- export


@pytest.mark.parametrize("case", ["lora", "rslora", "lora_bias", "patterns", "melora", "modules_to_save", "bias_all"])
def test_export_is_a_plain_lora_with_the_same_output(case: str, tmp_path: Path) -> None:
    source = adapted(**CASES[case])
    fastpeft.export_lora(source, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["peft_type"] == "LORA" and config["lora_alpha"] == config["r"] and not config["use_dora"]
    fastpeft.load_adapter(fresh := Net(), tmp_path)
    assert_same_output(source, fresh, 1e-5)


def test_export_joins_the_ranks_of_two_methods(tmp_path: Path) -> None:
    source = adapted(["lora", "melora"], target_modules=["body.0"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastpeft.export_lora(source, tmp_path)
    fastpeft.load_adapter(fresh := Net(), tmp_path)
    assert_same_output(source, fresh, 1e-5)


def test_export_refuses_a_gain(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Gain"):
        fastpeft.export_lora(adapted("dora"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
