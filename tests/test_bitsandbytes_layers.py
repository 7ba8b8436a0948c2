"""adapt on models whose linears are bitsandbytes': beside stock PEFT on the same model, there and back, merged, saved."""

from __future__ import annotations

import copy

import pytest
import torch
from tolerance import assert_as_good
from torch import nn

import fastpeft

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def packed(kind, dtype=torch.float32, **options):
    """Two layers of bitsandbytes with the weights of torch's default start, quantised."""
    torch.manual_seed(0)
    plain = [nn.Linear(64, 128), nn.Linear(128, 64)]
    if kind == "int8":
        made = [bnb.nn.Linear8bitLt(m.in_features, m.out_features, has_fp16_weights=False, threshold=0.0) for m in plain]
    else:
        make = bnb.nn.LinearNF4 if kind == "nf4" else bnb.nn.LinearFP4
        made = [make(m.in_features, m.out_features, compute_dtype=dtype, **options) for m in plain]
    for new, old in zip(made, plain, strict=True):
        new.load_state_dict(old.state_dict())
    return Net(*made).to("cpu").train()


KINDS = {
    "nf4": ("nf4", {"compress_statistics": False}),
    "nested": ("nf4", {"compress_statistics": True}),
    "fp4": ("fp4", {"compress_statistics": False}),
    "int8": ("int8", {}),
}
kinds = pytest.mark.parametrize("kind", list(KINDS))


def build(kind, dtype=torch.float32):
    name, options = KINDS[kind]
    return packed(name, dtype, **options)


def moved(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def inputs(dtype=torch.float32):
    torch.manual_seed(2)
    return torch.randn(3, 5, 64, dtype=dtype)


@kinds
def test_beside_stock_peft(kind, tmp_path):
    """Outputs and every gradient of a LoRA, saved by us and loaded by PEFT over the same packed layers."""
    ours = build(kind)
    theirs = copy.deepcopy(ours)
    fastpeft.adapt(ours, "lora", rank=4, target_modules=["up", "down"])
    moved(ours)
    fastpeft.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path), is_trainable=True).train()
    exact = Net(*(dense(m) for m in (ours.up, ours.down))).double()
    fastpeft.load_adapter(exact, tmp_path)
    exact.double().requires_grad_(True)
    seen = []
    for model, dtype in ((ours, torch.float32), (exact, torch.float64), (theirs, torch.float32)):
        x = inputs().to(dtype).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        own = {n.replace(".default.weight", "").replace("adapter.lora.", "lora_").removeprefix("base_model.model."): p.grad
               for n, p in model.named_parameters() if "lora" in n}  # fmt: skip
        seen.append({"y": y, "x": x.grad} | own)
    for n, got in seen[0].items():
        assert_as_good(got, seen[1][n], seen[2][n], n)


@kinds
def test_there_and_back(kind):
    model = build(kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes, x = [type(m) for m in model.children()], inputs()
    report = fastpeft.adapt(model, "dora", rank=4)
    assert report.adapted == ["up", "down"] and type(model.up).__mro__[2] is classes[0]
    start = model(x)
    moved(model)
    with fastpeft.adapters_off(model):
        off = model(x)
    assert torch.equal(off, Net(*(dense(m) for m in (model.up, model.down)))(x))
    assert torch.allclose(start, off, atol=1e-5) and not torch.allclose(model(x), off, atol=1e-3)
    fastpeft.unload(model)
    assert [type(m) for m in model.children()] == classes
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def dense(layer):
    """An nn.Linear of the layer's dequantised weight."""
    from fastpeft.integrations.bitsandbytes import base_of

    made = nn.Linear(layer.in_features, layer.out_features)
    made.weight = nn.Parameter(base_of(layer, torch.float32).dense(torch.float32))
    made.bias = nn.Parameter(layer.bias.detach().float())
    return made


@kinds
@pytest.mark.parametrize("method", ["lora", "dora", "rosa"])
def test_merge_makes_dense_layers(kind, method, tmp_path):
    from checks import with_masks

    model, x = build(kind), inputs()
    fastpeft.adapt(model, method, **({"density": 0.1} if method == "rosa" else {"rank": 4}))
    moved(with_masks(model)).eval()
    want = model(x)
    fastpeft.save_adapter(model, tmp_path)
    again = build(kind)
    fastpeft.load_adapter(again, tmp_path)
    assert torch.equal(again.eval()(x), want)
    fastpeft.merge(model)
    assert [type(m) for m in model.children()] == [nn.Linear, nn.Linear]
    assert torch.allclose(model(x), want, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_y_has_the_dtype_of_x(dtype):
    """compute_dtype is what is computed in, as in bitsandbytes; what comes back is in x's."""
    model = build("nf4", torch.bfloat16)
    fastpeft.adapt(model, "lora", rank=4)
    assert model.up.adapter.lora.A.dtype is torch.float32
    x = inputs(dtype)
    y = model.up(x)
    assert y.dtype is dtype
    base = dense(model.up)
    want = nn.functional.linear(x.float(), base.weight, base.bias)
    assert float((y.float() - want).abs().max()) < 2**-6 * float(want.abs().max())


@kinds
def test_it_trains(kind):
    model, x = build(kind), inputs()
    fastpeft.adapt(model, "lora", rank=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]


def test_what_cannot_be_said_over_packed_weights():
    for options, words in (
        (dict(method="rosa", overlay=True), "overlay"),
        (dict(method="loftq"), "quantised already"),
        (dict(method="lora", quantize="nf4"), "quantised already|quantize"),
    ):
        model = build("nf4")
        with pytest.raises(ValueError, match=words):
            fastpeft.adapt(model, **options)
        assert type(model.up) is bnb.nn.LinearNF4


def test_a_layer_that_is_not_quantised_yet():
    model = Net(bnb.nn.LinearNF4(64, 64), bnb.nn.LinearNF4(64, 64))
    with pytest.raises(ValueError, match="not quantised"):
        fastpeft.adapt(model, "lora")
