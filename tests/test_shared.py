"""Parameters that several layers share: one module, saved once, restored shared, through everything that a model goes through."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import DT, perturb, rand
from tolerance import assert_fp64
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpeft

# a composition that lies in no layer: the root's hooks make it once a forward
PER_FORWARD = dict(rho=0.6, shuffle=True, groups=2)
CASES = {
    "lotr": ("lotr", {}),
    "superlora": ("superlora", {}),
    "stack": ("superlora", dict(fold="stack")),
    "projected": ("superlora", PER_FORWARD),
}
every = pytest.mark.parametrize("case", list(CASES))
WIDTH = 8


class Block(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.q, self.v = nn.Linear(WIDTH, WIDTH, dtype=dtype), nn.Linear(WIDTH, WIDTH, dtype=dtype)

    def forward(self, x):
        return x + torch.tanh(self.v(torch.tanh(self.q(x))))


class Tower(nn.Module):
    """Three blocks of two layers; checkpointed: None, or use_reentrant."""

    def __init__(self, dtype=DT, blocks=3):
        super().__init__()
        self.blocks = nn.ModuleList([Block(dtype) for _ in range(blocks)])
        self.checkpointed = None

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.checkpointed is None else checkpoint(block, x, use_reentrant=self.checkpointed)
        return x


def adapted(case, model=None, moved=True, **options):
    method, own = CASES[case]
    model = Tower() if model is None else model
    fastpeft.adapt(model, method, rank=2, **(own | options))
    return perturb(model) if moved else model


def methods(model):
    return [m for n, a in model.named_modules() if n.endswith(".adapter") for m in a.methods().values()]


def holder(model):
    (found,) = {id(m.holder): m.holder for m in methods(model)}.values()
    return found


def assert_shared(model):
    """One holder for all six layers, and it is the one in the module tree."""
    assert len(methods(model)) == 6
    (registered,) = model.adapter_shared.values()
    assert holder(model) is registered


def trains(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def grads(model, x, run=None):
    y = (model if run is None else run)(x)
    own = trains(model)
    return dict(zip(("y", "x", *own), (y.detach(), *torch.autograd.grad(y.square().sum(), (x, *own.values()))), strict=True))


def assert_same(got, want):
    assert set(got) == set(want)
    for n in want:
        assert_fp64(got[n], want[n], n)


@every
def test_one_holder_listed_once(case):
    model = adapted(case)
    assert_shared(model)
    own = {id(p) for p in model.parameters() if p.requires_grad}
    names = [n for n, _ in model.named_parameters(remove_duplicate=False) if "adapter" in n]
    assert len(names) == len(own) == len(set(names))
    shared = [n for n in names if n.startswith("adapter_shared.")]
    assert len(shared) == len(list(holder(model).parameters())) and all(".adapter." in n for n in set(names) - set(shared))
    assert set(holder(model).ROLES) == {n.split(".")[0] for n, _ in holder(model).named_parameters()}


@every
def test_the_report_counts_what_is_shared_once(case):
    model = Tower()
    method, own = CASES[case]
    report = fastpeft.adapt(model, method, rank=2, **own)
    shared = sum(p.numel() for p in holder(model).parameters())
    (name,) = report.shared
    assert report.shared[name] == (6, shared) and model.get_submodule(name) is holder(model)
    private = sum(r.trainable for r in report.layers.values())
    assert report.trainable == shared + private == sum(p.numel() for p in trains(model).values())
    text = str(report)
    assert "shared by 6 layers" in text and f"{shared:,d}" in text and "use_reentrant=False" in text
    plain = fastpeft.adapt(Tower(), "lora", rank=2)
    assert not plain.shared and "shared" not in str(plain)


@every
def test_saved_once_and_restored_shared(case, tmp_path):
    from safetensors import safe_open

    plain, x = Tower(), rand(3, WIDTH)
    model = adapted(case, copy.deepcopy(plain))
    want = model(x)
    fastpeft.save_adapter(model, tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        keys = list(file.keys())
    names = [n for n, _ in model.named_parameters() if "adapter" in n]
    assert sorted(keys) == sorted(f"base_model.model.{n}" for n in names)
    loaded, report = copy.deepcopy(plain), fastpeft.load_adapter(fresh := copy.deepcopy(plain), tmp_path)
    assert torch.equal(fresh(x), want) and report.shared
    assert_shared(fresh)
    adapted(case, loaded)  # into a model that is adapted already
    fastpeft.load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(x), want)
    perturb(fresh)
    assert not torch.equal(fresh(x), want) and torch.equal(loaded(x), want)


@every
def test_a_folder_without_the_shared_tensors_is_refused(case, tmp_path):
    from fastpeft.folder import CheckpointError, read_folder, write_folder

    model = adapted(case)
    fastpeft.save_adapter(model, tmp_path)
    config, tensors, meta = read_folder(tmp_path)
    key = next(k for k in tensors if "adapter_shared" in k)
    write_folder(tmp_path, {k: t for k, t in tensors.items() if k != key}, config, meta)
    plain = Tower()
    with pytest.raises(CheckpointError, match=r"missing.*adapter_shared"):
        fastpeft.load_adapter(plain, tmp_path)
    assert not hasattr(plain, "adapter_shared") and not plain._forward_hooks and not plain._forward_pre_hooks


@every
def test_deepcopies_share_among_themselves(case):
    model, x = adapted(case), rand(3, WIDTH)
    want, twin = model(x), copy.deepcopy(model)
    assert_shared(twin)
    assert holder(twin) is not holder(model) and torch.equal(twin(x), want)
    perturb(twin)
    assert torch.equal(model(x), want) and not torch.equal(twin(x), want)
    fastpeft.unload(twin)
    assert torch.equal(model(x), want)
    layer = copy.deepcopy(model.blocks[0].q)  # alone it has what it shared to itself
    assert torch.equal(layer(x), model.blocks[0].q(x))
    with torch.no_grad():
        for p in layer.adapter.methods().popitem()[1].holder.parameters():
            p.add_(1)
    assert torch.equal(model(x), want)


@every
def test_moves_modes_and_flags_reach_the_holder(case):
    model, x = adapted(case, Tower(torch.float32)), torch.randn(3, WIDTH)
    want = model(x)
    model.double()
    assert {p.dtype for p in holder(model).parameters()} == {DT}
    assert_shared(model)
    error, eps = (model(x.double()) - want).abs().max(), torch.finfo(torch.float32).eps
    assert 0 < error < 1e3 * eps
    model.to(torch.bfloat16)
    assert {p.dtype for p in holder(model).parameters()} == {torch.bfloat16} and model(x.bfloat16()).isfinite().all()
    for mode in (False, True):
        assert model.train(mode) is model and holder(model).training is mode
    model.requires_grad_(False)
    assert not trains(model) and not any(p.requires_grad for p in holder(model).parameters())
    model.to("meta")
    assert {p.device.type for p in holder(model).parameters()} == {"meta"}


@every
def test_unload_deletes_the_holder(case):
    model, x = Tower(), rand(3, WIDTH)
    before, want, keys = copy.deepcopy(model.state_dict()), model(x), list(model._modules)
    adapted(case, model)
    assert not torch.equal(model(x), want)
    fastpeft.unload(model)
    assert list(model._modules) == keys and not model._forward_hooks and not model._forward_pre_hooks
    assert list(model.state_dict()) == list(before) and torch.equal(model(x), want)
    adapted(case, model)  # and it can be adapted again
    assert_shared(model)


@every
def test_merge(case):
    model, x = adapted(case), rand(3, WIDTH)
    want = model(x)
    fastpeft.merge(model)
    assert not hasattr(model, "adapter_shared") and not model._forward_hooks and not model._forward_pre_hooks
    assert_fp64(model(x), want)
    assert {type(m) for m in model.modules()} == {Tower, nn.ModuleList, Block, nn.Linear}


@every
def test_a_merge_that_fails_leaves_everything(case):
    model, x = adapted(case), rand(3, WIDTH)
    want, last = model(x), model.blocks[2].v
    kept = last.weight.detach().clone()
    last.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        fastpeft.merge(model)
    last.weight.data.copy_(kept)
    assert_shared(model)
    assert torch.equal(model(x), want)


@every
def test_adapters_off_between_forward_and_backward(case):
    model, x = Tower(), rand(4, WIDTH)
    base = model(x)
    adapted(case, model)
    want = grads(model, x)
    y = model(x)
    with fastpeft.adapters_off(model):
        assert torch.equal(model(x), base)
        with torch.no_grad(), fastpeft.adapters_off(model):
            assert torch.equal(model(x), base)
    assert torch.equal(model(x), want["y"])
    own = trains(model)
    got = dict(zip(own, torch.autograd.grad(y.square().sum(), list(own.values())), strict=True))
    assert_same(got, {n: want[n] for n in own})


@every
def test_frozen_shares_get_no_gradient_and_the_rest_does(case):
    model, x = adapted(case), rand(3, WIDTH)
    frozen = next(iter(holder(model).parameters()))
    frozen.requires_grad_(False)
    want, own = model(x), trains(model)
    want.square().sum().backward()
    assert frozen.grad is None and all(p.grad is not None and p.grad.any() for p in own.values())
    for p in holder(model).parameters():
        p.requires_grad_(False)
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    assert torch.equal(y, want) and all(p.grad is None for p in holder(model).parameters())


@every
def test_the_optimiser_sees_and_decays_each_share_once(case):
    model, x = adapted(case), rand(5, WIDTH)
    own = trains(model)
    before = {n: p.detach().clone() for n, p in own.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    assert len(optimizer.param_groups[0]["params"]) == len({id(p) for p in model.parameters()})
    want = grads(model, x)
    model(x).square().sum().backward()
    optimizer.step()
    for n, p in own.items():
        assert_fp64(p.detach(), before[n] - 0.1 * (want[n] + 0.5 * before[n]), n)


@every
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(case, reentrant, whole):
    model, x = adapted(case).train(), rand(4, WIDTH)
    model(x).square().sum().backward()
    want = {n: p.grad for n, p in trains(model).items()} | {"x": x.grad}
    model.zero_grad()
    x.grad = None
    model.checkpointed = None if whole else reentrant
    y = checkpoint(model, x, use_reentrant=reentrant) if whole else model(x)
    if case == "projected" and reentrant and not whole:
        with pytest.raises(RuntimeError, match=r"blocks.2.q.*use_reentrant=False"):
            y.square().sum().backward()
        return
    y.square().sum().backward()
    assert_same({n: p.grad for n, p in trains(model).items()} | {"x": x.grad}, want)


@pytest.mark.parametrize("freeze", [False, True])
def test_checkpointed_micro_batches_of_a_composition(freeze):
    """Two forwards before two backwards, in either order; what backward composed again is let go; so without a gradient."""
    model, x = adapted("projected").train(), rand(6, WIDTH)
    if freeze:
        model.requires_grad_(False)
    model(x).square().sum().backward()
    want = {n: p.grad for n, p in trains(model).items()} | {"x": x.grad}
    for order in ((0, 1), (1, 0)):
        model.zero_grad()
        x.grad = None
        model.checkpointed = False
        outs = [model(x[:2]), model(x[2:])]
        with torch.no_grad():
            model(x)
            model.blocks[0].q(x)
        for k in order:
            outs[k].square().sum().backward()
            assert holder(model).again is None and not holder(model).live
        assert_same({n: p.grad for n, p in trains(model).items()} | {"x": x.grad}, want)


def test_a_composition_is_made_once_a_forward_and_once_a_backward(monkeypatch):
    model, x, made = adapted("projected"), rand(3, WIDTH), []
    layout = type(holder(model).layout)
    real = layout.updates
    monkeypatch.setattr(layout, "updates", lambda self, *t: made.append(len(t)) or real(self, *t))
    monkeypatch.setattr(layout, "update", None)  # no layer composes for itself
    y = model(x)
    assert len(made) == 1
    y.square().sum().backward()
    assert len(made) == 2
    model.checkpointed = False
    model(x).square().sum().backward()  # and once more for the recompute of the blocks
    assert len(made) == 5
    with torch.no_grad(), fastpeft.adapters_off(model):
        model(x)
    assert len(made) == 5
    fastpeft.merge(model)
    assert len(made) == 6


def test_a_layer_called_by_itself_composes_for_itself():
    model, x = adapted("projected"), rand(3, WIDTH)
    layer, own = model.blocks[1].v, trains(model)
    y = layer(x)
    delta = holder(model).layout.update("blocks.1.v", *holder(model).tensors())
    want = nn.functional.linear(x, layer.weight + delta, layer.bias)
    # of two groups it lies in the second alone
    own = {n: p for n, p in own.items() if n.endswith(("factors.3", "factors.4", "factors.5", "cores.1"))}
    assert len(own) == 4
    for n, g, w in zip(
        ("x", *own), *(torch.autograd.grad(t.square().sum(), (x, *own.values())) for t in (y, want)), strict=True
    ):
        assert_fp64(g, w, n)
    assert_fp64(y, want)
    z = checkpoint(layer, x, use_reentrant=False)
    assert_fp64(torch.autograd.grad(z.square().sum(), x)[0], torch.autograd.grad(layer(x).square().sum(), x)[0])


def test_a_failed_forward_leaves_no_composition():
    model, x = adapted("projected"), rand(3, WIDTH)
    with pytest.raises(ValueError, match="in_features"):
        model(rand(3, WIDTH + 1))
    assert not holder(model).live
    with torch.no_grad():
        for p in holder(model).parameters():
            p.add_(0.1)
    want = nn.functional.linear(
        x, model.blocks[0].q.weight + holder(model).layout.update("blocks.0.q", *holder(model).tensors()), model.blocks[0].q.bias
    )
    assert_fp64(model.blocks[0].q(x), want)


def test_a_composition_is_not_touched_by_autocast():
    model, x = adapted("projected", Tower(torch.float32)), torch.randn(3, WIDTH)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda *a: seen.append(dict(holder(model).live[-1])))
    model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    assert all(torch.equal(seen[0][n], seen[1][n]) for n in seen[0]) and len(seen[0]) == 6


@pytest.mark.parametrize("case", ["stack", "projected"])
def test_compiles_whole(case):
    """(The defaults of each recipe compile in test_methods_in_models.)"""
    from torch._dynamo.testing import CompileCounterWithBackend

    fewer = dict(groups=1) if case == "projected" else {}
    model, graphs = adapted(case, Tower(blocks=1), **fewer).train(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for rows in (3, 5):
        x = rand(rows, WIDTH)
        assert_same(grads(model, x, compiled), grads(model, x))
    # the composition before the forward is a graph of its own
    assert graphs.frame_count <= 2 + (case == "projected")
    if case == "projected":
        model.checkpointed = False
        assert_same(grads(model, x, compiled), grads(model, x))
    model.eval()
    model.checkpointed = None
    with torch.no_grad():
        assert_fp64(compiled(x), model(x))
    with torch.no_grad():
        for p in holder(model).parameters():
            p.add_(0.1)
    assert_same(grads(model, x, compiled), grads(model, x))  # nothing of the first parameters is left in the graph


@every
@pytest.mark.parametrize("build", [nn.Sequential, lambda *m: nn.Sequential(nn.Sequential(*m))], ids=["flat", "nested"])
def test_a_container_as_root(case, build, tmp_path):
    """A Sequential would run, and a ModuleList count, a child that is put beside its own."""
    plain, x = build(nn.Linear(8, 8, dtype=DT), nn.Tanh(), nn.Linear(8, 8, dtype=DT)), rand(3, 8)
    before, model = plain(x), copy.deepcopy(plain)
    method, own = CASES[case]
    report = fastpeft.adapt(model, method, rank=2, **own)
    assert torch.equal(model(x), before) and len(model) == len(plain)
    (name,) = report.shared
    assert ".adapter_shared." in name and model.get_submodule(name) is methods(model)[0].holder is methods(model)[1].holder
    want = perturb(model)(x)
    assert not torch.equal(want, before)
    twin = copy.deepcopy(model)
    assert torch.equal(perturb(twin)(x), twin(x)) and torch.equal(model(x), want)
    fastpeft.save_adapter(model, tmp_path)
    fastpeft.load_adapter(loaded := copy.deepcopy(plain), tmp_path)
    assert torch.equal(loaded(x), want)
    with fastpeft.adapters_off(model):
        assert torch.equal(model(x), before)
    fastpeft.unload(model)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()] and torch.equal(model(x), before)
    assert_fp64(fastpeft.merge(loaded)(x), want)
    assert [n for n, _ in loaded.named_modules()] == [n for n, _ in plain.named_modules()]


@every
def test_a_layer_that_stands_alone(case):
    method, own = CASES[case]
    layer, x = fastpeft.AdaptedLinear(6, 5, method=method, rank=2, dtype=DT, **own), rand(3, 6)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    perturb(layer)
    assert layer.adapter_shared[next(iter(layer.adapter_shared))] is layer.adapter.get_submodule(method).holder
    layer(x).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)
    twin = fastpeft.AdaptedLinear(6, 5, method=method, rank=2, dtype=DT, **own)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    given = nn.Linear(6, 5, dtype=DT)
    assert torch.equal(fastpeft.AdaptedLinear.from_linear(given, method, rank=2, **own)(x), given(x))
    assert not any("adapter" in n for n, _ in given.named_modules())


def test_two_methods_that_share():
    model, x = Tower(), rand(3, WIDTH)
    report = fastpeft.adapt(model, ["lotr", "superlora", "lora"], rank=2)
    assert {n.split(".")[1].split("_")[0] for n in report.shared} == {"lotr", "superlora"}
    perturb(model)
    want = model(x)
    fastpeft.merge(model)
    assert_fp64(model(x), want)


def test_devices_and_dtypes_do_not_mix():
    model = Tower()
    model.blocks[1].q.float()
    with pytest.raises(ValueError, match=r"lotr shares.*'blocks.0.q'.*float32 on cpu and as torch.float64 on cpu"):
        fastpeft.adapt(model, "lotr", rank=2)
    assert not hasattr(model, "adapter_shared")
    model = Tower()
    model.blocks[2].to("meta")
    with pytest.raises(ValueError, match=r"on cpu and as torch.float64 on meta"):
        fastpeft.adapt(model, "superlora", rank=2)


def test_a_model_with_that_attribute_is_refused():
    model = Tower()
    model.adapter_shared = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"adapter_shared.*already"):
        fastpeft.adapt(model, "lotr", rank=2)


def test_only_holders_of_a_composition_are_opened(monkeypatch):
    """A layer of another rank is a group of its own, which its layer composes: beside a composition it stays shut."""
    model = Tower()
    fastpeft.adapt(model, "superlora", rho=0.5, rank=2, rank_pattern={"blocks.0.q": 4})
    shut = [h for h in model.adapter_shared.children() if not h.per_forward]
    assert len(shut) == 1 and len(list(model.adapter_shared.children())) == 2
    monkeypatch.setattr(shut[0], "updates", lambda *tensors: pytest.fail("composed for nobody"))
    x = rand(3, WIDTH)
    model(x).sum().backward()
    model.eval()
    y = model(x)
    fastpeft.merge(model)
    assert_fp64(model(x), y.detach())
