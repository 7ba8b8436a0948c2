"""LoRA-FA's preconditioned mode against PEFT's create_lorafa_optimizer, and against the least-squares problem that it solves."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from checks import DT, MLP, rand
from tolerance import assert_fp64

import fastpeft
from fastpeft import train

pytest.importorskip("peft")
import peft
from peft.optimizers import create_lorafa_optimizer, lorafa

RANK, ALPHA, LR = 3, 6, 0.02


def pair(dtype, **options):
    """Our model and PEFT's with the same values, and our B -> theirs."""
    base = MLP(dtype)
    ours = copy.deepcopy(base)
    fastpeft.adapt(ours, "lora_fa", rank=RANK, alpha=ALPHA, **options)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["up", "down"], use_rslora=options.get("rslora", False))
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    twins = {}
    for site in ("up", "down"):
        m, layer = getattr(ours, site).adapter.lora_fa, theirs.base_model.model.get_submodule(site)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(m.A)
        twins[m.B] = layer.lora_B["default"].weight
    return ours, theirs, twins


def trained(dtype, decay, steps=20, **options):
    """Both models after each of 20 steps: yields the twins."""
    ours, theirs, twins = pair(dtype, **options)
    procedures = [train.LoRAFAPreconditioner()]
    optimizer = train.build_optimizer(ours, procedures, train.HFAdamW, lr=LR, weight_decay=decay)
    oracle = create_lorafa_optimizer(theirs, RANK, ALPHA, lr=LR, weight_decay=decay)
    with train.attach(ours, optimizer, procedures) as runner:
        for _ in range(steps):
            x, target = torch.randn(9, 16, dtype=dtype), torch.randn(9, 16, dtype=dtype)
            for model, opt in ((ours, optimizer), (theirs, oracle)):
                (model(x) - target).square().mean().backward()
                opt.step()
                opt.zero_grad()
            runner.step_end()
            yield twins


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("rslora", [False, True])
def test_equals_peft_over_twenty_steps(decay, rslora, monkeypatch):
    """In fp64, with PEFT's product in the gradient's own dtype."""
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    for twins in trained(DT, decay, rslora=rslora):
        for p, q in twins.items():
            assert_fp64(p.detach(), q.detach())
    assert all(p.abs().max() > 0.1 for p in twins)


def test_pefts_bf16_product_is_all_that_differs_in_fp32(monkeypatch):
    """With the product made from bf16 operands here too, fp32 training as PEFT does it gives the same bits for 20 steps."""

    def as_peft(self, ctx):
        for m in ctx.model.modules():
            if isinstance(m, train.lora_fa.LoRAFA):
                product = m.B.grad.bfloat16() @ self._invert(m.A).bfloat16()
                m.B.grad = ((1 / m.scale**2) * product).to(m.B.dtype)

    exact = [{k: p.detach().clone() for k, p in enumerate(twins)} for twins in trained(torch.float32, 0.1)]
    torch.manual_seed(0)
    monkeypatch.setattr(train.LoRAFAPreconditioner, "before_step", as_peft)
    gaps = []
    for ours, twins in zip(exact, trained(torch.float32, 0.1), strict=True):
        for k, (p, q) in enumerate(twins.items()):
            assert torch.equal(p, q)
            gaps.append((ours[k] - q).abs().max() / q.abs().max())
    assert 0 < max(gaps) < 0.1  # what the bf16 product alone makes of it


def test_the_preconditioned_gradient_is_the_least_squares_solution():
    """s g' A is the point of A's row space, times s, that is nearest to the gradient of W."""
    model = MLP()
    fastpeft.adapt(model, "lora_fa", rank=RANK, alpha=ALPHA)
    m, x = model.down.adapter.lora_fa, rand(9, 16)
    W = model.down.weight
    procedures = [train.LoRAFAPreconditioner(delta=1e-14)]
    optimizer = train.build_optimizer(model, procedures, torch.optim.SGD, lr=0.5)
    with train.attach(model, optimizer, procedures) as runner:
        hidden = torch.tanh(model.up(x)).detach()
        W.requires_grad_(True)
        (G,) = torch.autograd.grad(torch.nn.functional.linear(hidden, W, model.down.bias).square().sum(), W)
        W.requires_grad_(False)
        model(x).square().sum().backward()
        optimizer.step()
        step = -m.B.detach() / 0.5
        runner.step_end()
    want = torch.linalg.lstsq(m.A.T, G.T).solution.T / m.scale
    assert_fp64(step, want)


def test_orthonormal_rows_make_both_modes_equal_up_to_scale():
    model = MLP()
    fastpeft.adapt(model, "lora_fa", rank=RANK, alpha=2 * RANK)
    for m in (model.up.adapter.lora_fa, model.down.adapter.lora_fa):
        m.A.data = torch.linalg.qr(m.A.data.T).Q.T.contiguous()
    seen = {}

    class Look(train.Procedure):
        def before_step(self, ctx):
            seen[len(seen)] = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    procedures = [Look(), train.LoRAFAPreconditioner(), Look()]
    procedures[2].before_step = lambda ctx: Look.before_step(procedures[2], ctx)
    optimizer = train.build_optimizer(model, procedures, torch.optim.AdamW, lr=LR)
    with train.attach(model, optimizer, procedures) as runner:
        model(rand(9, 16)).square().sum().backward()
        optimizer.step()
        runner.step_end()
    for before, after in zip(seen[0], seen[1], strict=True):
        assert_fp64(after, before / 4 / (1 + procedures[1].delta))


def test_hf_adamw_is_what_its_docstring_says():
    p = torch.randn(5, dtype=DT).requires_grad_()
    want, m, v = p.detach().clone(), torch.zeros(5, dtype=DT), torch.zeros(5, dtype=DT)
    optimizer = train.HFAdamW([{"params": [p]}], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    for t in range(1, 6):
        g = torch.randn(5, dtype=DT)
        m, v = 0.8 * m + (1 - 0.8) * g, 0.9 * v + (1 - 0.9) * g**2
        want = want - 0.1 * math.sqrt(1 - 0.9**t) / (1 - 0.8**t) * m / (v.sqrt() + 1e-3)
        want = want - 0.1 * 0.2 * want
        p.grad = g.clone()
        optimizer.step()
        assert_fp64(p.detach(), want)


def test_hf_adamw_resumes_and_takes_a_closure():
    p = torch.zeros(3, dtype=DT).requires_grad_()
    first = train.HFAdamW([p], lr=0.1)

    def closure():
        first.zero_grad()
        loss = (p - 1).square().sum()
        loss.backward()
        return loss

    assert first.step(closure).item() == 3.0 and p.abs().max() > 0.09
    q = p.detach().clone().requires_grad_()
    second = train.HFAdamW([q], lr=0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer, r in ((first, p), (second, q)):
        r.grad = torch.ones(3, dtype=DT)
        optimizer.step()
    assert torch.equal(p, q)
    with pytest.raises(ValueError, match=r"HFAdamW: lr=-1.*at least 0"):
        train.HFAdamW([p], lr=-1)


def test_a_layer_of_half_precision_has_its_inverse_in_fp32():
    model = MLP(torch.bfloat16)
    fastpeft.adapt(model, "lora_fa", rank=RANK)
    model.to(torch.bfloat16)
    procedures = [train.LoRAFAPreconditioner()]
    optimizer = train.build_optimizer(model, procedures, torch.optim.SGD, lr=0.1)
    with train.attach(model, optimizer, procedures) as runner:
        model(torch.randn(5, 16, dtype=torch.bfloat16)).square().sum().backward()
        optimizer.step()
        assert {P.dtype for P in procedures[0]._inverse.values()} == {torch.float32}
        runner.step_end()
    assert not procedures[0]._inverse and model.up.adapter.lora_fa.B.isfinite().all() and model.up.adapter.lora_fa.B.any()


def test_what_is_refused():
    def entered(model, **options):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        return train.attach(model, optimizer, [train.LoRAFAPreconditioner(**options)]).__enter__()

    with pytest.raises(ValueError, match="attached to a MLP without a lora_fa layer"):
        entered(MLP())
    model = MLP()
    fastpeft.adapt(model, "lora_fa", rank=RANK)
    model.down.adapter.lora_fa.A.requires_grad_(True)
    with pytest.raises(ValueError, match=r"at 'down' its A trains"):
        entered(model)
    model = MLP()
    fastpeft.adapt(model, "lora_fa", rank=RANK, alpha=0)
    with pytest.raises(ValueError, match="its scale is 0"):
        entered(model)
    with pytest.raises(ValueError, match=r"delta=0.*more than 0"):
        entered(model, delta=0)


def test_a_second_one_is_refused():
    model, _, _ = pair(DT)
    procedures = [train.LoRAFAPreconditioner(), train.LoRAFAPreconditioner()]
    optimizer = train.build_optimizer(model, procedures, torch.optim.SGD, lr=0.1)
    with pytest.raises(RuntimeError, match="has this procedure already"), train.attach(model, optimizer, procedures):
        pass
