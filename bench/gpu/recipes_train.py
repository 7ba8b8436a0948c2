"""Of stage recipes: the procedures over a few steps, moa's routers, starts from the weight, and the Laplace posterior.

The device's run is held against the same run on the CPU in fp32, both from one model. A tensor may be off by 1e-3 of how far the
run moved it, and by fp32's rounding of its values in each step. All draws of the procedures are made on the CPU, from seeds, and so
are equal. SGD throughout, but where a procedure asks for another: AdamW would blow up the rounding of gradients that are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastpeft
from bench.gpu import recipes
from bench.gpu.common import Row, Run, Task
from bench.gpu.recipes import WIDTH, Net, Spec, adapted, placed
from fastpeft import train
from fastpeft.ops.family import implementation

SHARE, STEPS = 1e-3, 4
# of a posterior and a start; both are made in fp64 or by an SVD in fp32
CLOSE = 1e-4


class Course(NamedTuple):
    method: str
    procedures: Callable[[], Sequence[train.Procedure]]
    options: Mapping[str, Any] = MappingProxyType({})
    optimizer: Any = torch.optim.SGD


def batch(k: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + k)
    return {n: torch.randn(4, 3, WIDTH, generator=generator) for n in ("x", "labels")}


def held_out(k: int) -> dict[str, Tensor]:
    return batch(50 + k)


COURSES: dict[str, Course] = {
    "adalora": Course("adalora", lambda: [train.AdaLoRASchedule(2)]),
    "aflora": Course("aflora", lambda: [train.AFLoRAFreezing(1, 1, deltaT=1)]),
    "alora_alloc": Course("alora_alloc", lambda: [train.ALoRAAllocation(held_out, warmup=1, interval=1)]),
    **{
        f"bilora {h}": Course("bilora", lambda h=h: [train.BiLoRABilevel(held_out, hypergrad=h, lr=0.1)])  # type: ignore[misc]
        for h in ("betty", "darts", "first_order")
    },
    "delta_lora": Course("delta_lora", lambda: [train.DeltaLoRASchedule(1)]),
    "delta_lora in place": Course("delta_lora", lambda: [train.DeltaLoRASchedule(1)], {"inplace": True}),
    "dylora": Course("dylora", lambda: [train.DyLoRASampling()]),
    "dylora frozen": Course("dylora", lambda: [train.DyLoRASampling("geometric", seed=3)], {"mode": "frozen"}),
    "galore": Course("galore", lambda: [train.GaLoreProjection()], {"gap": 2}),
    "galore per layer": Course("galore", lambda: [train.GaLoreProjection(per_layer=True)], {"gap": 2}),
    "galore adamw": Course("galore", lambda: [train.GaLoreProjection()], {"gap": 2}, train.GaLoreAdamW),
    **{
        f"lisa {p}": Course("lisa", lambda p=p: [train.LISASchedule(1, 2, p)])  # type: ignore[misc]
        for p in ("drop", "drop_all", "keep", "offload")
    },
    "lora_fa": Course("lora_fa", lambda: [train.LoRAFAPreconditioner()]),
    "lora_plus": Course("lora_plus", lambda: [train.LoRAPlus(8.0)]),
    "o_lora": Course("o_lora", lambda: [train.OLoRAPenalty(lambda2=0.1)], {"previous": 1}),
    "periodic_lora": Course("periodic_lora", lambda: [train.PeriodicLoRASchedule(2)]),
    "periodic_lora momentum": Course("periodic_lora", lambda: [train.PeriodicLoRASchedule(2, 0.25)]),
    **{
        f"rosa {s}": Course("rosa", lambda s=s: [train.RoSASchedule("wl1", score=s)])  # type: ignore[misc]
        for s in ("mean_sq", "mean_signed", "mean_abs")
    },
    "rosa overlay": Course("rosa", lambda: [train.RoSASchedule("wl1")], {"overlay": True}),
    "rosa window": Course("rosa", lambda: [train.RoSASchedule("wl1")], {"apply": "window"}),
    "sora": Course("sora", lambda: [train.SoRASchedule(1e-2)]),
}


def tasks(run: Run) -> Iterator[Task]:
    for name, course in COURSES.items():
        row = {"check": "procedure", "what": course.method, "case": name}
        yield row, lambda course=course: _course(run, course)
    yield {"check": "procedure", "what": "moa", "case": "routers"}, lambda: _routers(run)
    for spec in (Spec(*start) for start in STARTS):
        row = {"check": "start", "what": spec.method, "case": spec.case}
        yield row, lambda spec=spec: _start(run, spec)
    yield {"check": "posterior", "what": "laplace", "case": "fp32"}, lambda: _laplace(run)


def begun(course: Course) -> Net:
    """On the CPU. RoSA's masks are the schedule's to make."""
    spec = Spec(course.method, course.options)
    if course.method != "rosa":
        return adapted(spec, torch.float32)
    torch.manual_seed(1)
    model = Net()
    fastpeft.adapt(model, spec.method, **recipes.options_of(spec))
    return model.train()


def trained(model: Any, course: Course, device: str, impl: str) -> dict[str, Tensor]:
    """What the state dict holds after a few steps, on the CPU."""
    model = placed(model, device).train()
    for m in model.modules():
        m.__dict__.pop("attached", None)
    procedures = course.procedures()
    decay = {} if course.optimizer is torch.optim.SGD else {"eps": 1e-3, "weight_decay": 0.1}
    optimizer = train.build_optimizer(model, procedures, course.optimizer, lr=0.05, **decay)
    with implementation(impl), train.attach(model, optimizer, procedures, accumulation=2, total_steps=STEPS) as runner:
        for k in range(STEPS):
            for micro in range(2):
                given = {n: t.to(device) for n, t in batch(2 * k + micro).items()}
                (model(**given)["loss"] / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
        runner.epoch_end()
    return values(model)


def values(model: Any) -> dict[str, Tensor]:
    return {n: t.detach().cpu() for n, t in model.state_dict().items()}


def _course(run: Run, course: Course) -> Row:
    model = begun(course)
    want, got = trained(model, course, "cpu", "torch"), trained(model, course, run.device, "triton")
    return compared(got, want, values(model))


def compared(got: dict[str, Tensor], want: dict[str, Tensor], start: dict[str, Tensor]) -> Row:
    """Integers and flags are equal; at least one tensor moved."""
    worst, wrong, most = 0.0, [], 0.0
    for n, t in want.items():
        # the sign of a singular vector is anyone's
        if n.rpartition(".")[2] in ("P", "Q", "left", "right"):
            continue
        if got[n].shape != t.shape or not t.is_floating_point():
            wrong += [] if torch.equal(got[n], t) else [f"{n} differs"]
            continue
        same = n in start and start[n].shape == t.shape
        moved = float((t - start[n]).norm()) if same else float(t.norm())
        error = float((got[n] - t).norm())
        most = max(most, moved)
        worst = max(worst, error / moved) if moved else worst
        if not error <= SHARE * moved + STEPS * torch.finfo(torch.float32).eps * float(t.norm()):
            wrong.append(f"{n} {error:.1e}, moved {moved:.1e}")
    wrong += [] if most else ["nothing moved"]
    return {"error": worst, "right": not wrong, "wrong": "; ".join(wrong[:6])}


def _routers(run: Run) -> Row:
    """moa: labels as names of experts' numbers; the routers' penalty is in the loss."""
    model = adapted(Spec("moa", {"train_router": True, "experts": 3}), torch.float32)
    start = values(model)

    def course(device: str, impl: str) -> dict[str, Tensor]:
        m = placed(model, device)
        for part in m.modules():
            part.__dict__.pop("attached", None)
        procedures = [train.MoARouting(1.0)]
        optimizer = train.build_optimizer(m, procedures, torch.optim.SGD, lr=0.05)
        with implementation(impl), train.attach(m, optimizer, procedures) as runner:
            for k in range(STEPS):
                given = {n: t.to(device) for n, t in batch(k).items()}
                m(**given, domain=torch.tensor([0, 1, 2, k % 3], device=device))["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
                runner.step_end()
        return values(m)

    return compared(course(run.device, "triton"), course("cpu", "torch"), start)


STARTS: list[tuple[str, dict[str, Any]]] = [
    ("pissa", {}), ("pissa", {"fold": True}), ("pissa", {"bits": 4, "alpha": 4}), ("pissa", {"niter": 8}),
    ("loftq", {}), ("loftq", {"bits": 2}), ("loda", {"base": "r", "base_rank": 16}),
    ("loda", {"base": "s", "base_density": 0.5}), ("lotr", {"left": "svd", "right": "svd"}),
    ("random_masking", {}), ("random_masking", {"rank": 2}), ("superlora", {"rho": 0.5}), ("lora", {"quantize": "nf4"}),
    ("lora", {"quantize": "int8"}),
]  # fmt: skip


def _start(run: Run, spec: Spec) -> Row:
    """Adapted on the device and on the CPU from one weight: what the model computes, and the product of the factors.

    The weight has singular values far apart. Rounds of quantisation and SVD choose other levels where a value is a tie to rounding: there
    the distance from the model before is compared, within a hundredth. A randomised SVD draws on the device: there only y.
    """
    y, BA = {}, {}
    for place in ("cpu", "device"):
        device = run.device if place == "device" else "cpu"
        torch.manual_seed(1)
        model, x = spread(Net()).to(device), recipes.data(torch.float32)[0].to(device)
        with torch.no_grad(), implementation("triton" if place == "device" else "torch"):
            before = model(x)
            fastpeft.adapt(model, spec.method, **recipes.options_of(spec))
            if spec.method in ("random_masking", "lotr", "superlora", "lora"):
                # they start as an identity, and some of their draws are the device's own
                _fill(model)
            y[place] = (model.eval()(x) - (before if _rounded(spec) else 0)).double().cpu()
            parts: list[Any] = [m for m in model.modules() if spec.method == "pissa" and isinstance(getattr(m, "A", None), Tensor)]
            BA[place] = torch.cat([(p.B @ p.A).double().cpu().flatten() for p in parts] or [torch.ones(1).double()])
    if _rounded(spec):
        far, near = (float(y[place].norm()) for place in ("device", "cpu"))
        return {"error": abs(far / near - 1), "right": abs(far - near) <= 0.01 * near, "wrong": f"off by {far:.3e}, on the CPU by {near:.3e}"}
    gaps = [float((t["device"] - t["cpu"]).norm() / t["cpu"].norm()) for t in (y, BA)]
    gaps = gaps[:1] if "niter" in spec.options else gaps
    return {"error": max(gaps), "right": all(g <= CLOSE for g in gaps), "wrong": str(gaps)}


def _rounded(spec: Spec) -> bool:
    return spec.method == "loftq" or "bits" in spec.options


@torch.no_grad()
def spread(model: Net) -> Net:
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            U, S, V = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_((U * S.new_tensor([0.93**k for k in range(len(S))])) @ V)
    return model


@torch.no_grad()
def _fill(model: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))


class Classes(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = Net(1), torch.nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x).mean(1))


def _laplace(run: Run) -> Row:
    """Fitted, tuned and asked for variances; Monte Carlo draws are the device's own and only have to be near the probit."""
    from fastpeft import laplace

    torch.manual_seed(1)
    model = Classes()
    fastpeft.adapt(model, "laplace", rank=4, alpha=4, target_modules=["up", "down"])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    batches = [(batch(k)["x"], torch.tensor([0, 1, 2, k % 3])) for k in range(3)]
    found = {}
    # n_kfac and large: one run with whole sides, one by their largest eigenvalues
    for large in (512, 32):
        for device, impl in (("cpu", "torch"), (run.device, "triton")):
            with implementation(impl):
                posterior = laplace.fit(placed(model, device).eval(), batches, n_kfac=10, large=large)
                posterior.tune(steps=5)
                new = (batch(9)["x"],)
                f, S = posterior.logits(new)
                parts = [f, S, posterior.predict(new, "probit"), posterior.precision, posterior.log_evidence()]
                drawn = posterior.predict(new, samples=20_000)
                found[device == "cpu", large] = torch.cat([t.detach().double().cpu().flatten() for t in parts]), parts[2].cpu(), drawn.cpu()
    if not run.cuda:
        return {"right": all(v[0].isfinite().all() for v in found.values()), "wrong": ""}
    gaps, wrong = [], []
    for large in (512, 32):
        (want, _, mc), (got, _, own) = found[True, large], found[False, large]
        gaps.append(float((got - want).norm() / want.norm()))
        wrong += [] if gaps[-1] <= CLOSE else [f"large={large}: {gaps[-1]:.1e}"]
        # 20000 draws of a probability are off by at most 0.0036 as one standard deviation each
        if not float((own - mc).abs().max()) <= 0.03:
            wrong.append(f"large={large}: Monte Carlo {float((own - mc).abs().max()):.1e}")
    return {"error": max(gaps), "right": not wrong, "wrong": "; ".join(wrong)}
