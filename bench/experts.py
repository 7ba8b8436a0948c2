"""Experts of one layer on the CPU: python -m bench.experts [--save] [--threads N] [--quick] [--only switch|cost] ...

switch: all experts for every token (a LowRank) beside tokens grouped by expert (a Grouped), routed as phatgoose does, experts of
rank 16, by total rank, k and tokens. The limits that follow are for fastpeft/grouping.py.
cost: eight experts of rank 16 at [1024, 2048 -> 5632]: phatgoose, hydralora and moa beside the frozen layer, one LoRA, and PEFT.

Forward and backward: dx and the gradients of everything that trains. An arm is first held against its formula in fp64 (twice the
error of the same formula in the layer's dtype, plus one rounding of the largest value) and not timed where it is wrong. One
interleaved run holds all arms of a comparison. JSON lines, then a table in Markdown.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.expert_arms import EXPERTS, ONE, RANK, Arm, arms, inputs
from bench.harness import quartiles
from bench.machine import RESULTS, emit, name_of
from bench.oracle import distance
from fastpeft.job.layerbench import Shape
from fastpeft.job.measure import bytes_saved, interleaved
from fastpeft.linear import adapted_linear
from fastpeft.method.phatgoose import choose, route, standardised
from fastpeft.terms import Grouped, LowRank, Term

ROUNDS, QUICK = 15, 3
SHAPES = [(2048, 5632), (4096, 4096)]
TOKENS, TOTALS, PLACES = (256, 1024, 4096), (128, 256, 512, 1024, 2048, 4096), (1, 2)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COST = (1024, 2048, 5632)
ALL, GROUPED, FROZEN = "all experts", "grouped", "frozen"
FILE = RESULTS / "experts.jsonl"
Row = dict[str, Any]


class Problem:
    """One layer and its input; base products in fp64 and in the layer's dtype are computed once."""

    def __init__(self, tokens: int, size: tuple[int, int], dtype: torch.dtype, device: str = "cpu", rank: int = RANK):
        i, o = size
        torch.manual_seed(0)
        self.dtype, self.device, self.rank = dtype, device, rank
        self.W = (torch.randn(o, i, device=device) / i**0.5).to(dtype)
        self.x = torch.randn(tokens, i, device=device).to(dtype).requires_grad_()
        self.dy = torch.randn(tokens, o, device=device).to(dtype)

    @functools.cached_property
    def base(self) -> dict[torch.dtype, tuple[Tensor, Tensor]]:
        """(x W^T, dy W) in fp64 and in the layer's dtype."""
        x, dy = self.x.detach(), self.dy
        return {d: (x.to(d) @ self.W.to(d).T, dy.to(d) @ self.W.to(d)) for d in (torch.float64, self.dtype)}

    def experts(self, total: int) -> dict[str, Tensor]:
        """Factors and gates, fp32, exact in the layer's dtype."""
        (o, i), count = self.W.shape, total // self.rank
        torch.manual_seed(total)
        make = functools.partial(torch.randn, device=self.device)
        made = {"A": make(total, i) / i**0.5, "B": 0.5 * make(o, total), "V": make(count, i)}
        return {n: t.to(self.dtype).float().requires_grad_() for n, t in made.items()}


def terms(own: dict[str, Tensor], k: int) -> dict[str, Callable[[], Term]]:
    """The term of each arm, made anew in each forward as the method does."""
    ranks = ranks_of(own)
    return {
        ALL: lambda: LowRank(own["A"], own["B"], mid=functools.partial(route, k, ranks), rows=standardised(own["V"])),
        GROUPED: lambda: Grouped(own["A"], own["B"], ranks, functools.partial(choose, k), rows=standardised(own["V"])),
    }


def ranks_of(own: dict[str, Tensor]) -> tuple[int, ...]:
    count = len(own["V"])
    return (len(own["A"]) // count,) * count


def step(
    problem: Problem, own: dict[str, Tensor], term: Callable[[], Term] | None, impl: str | None = None
) -> tuple[Tensor, ...]:
    y = adapted_linear(problem.x, problem.W, None, [] if term is None else [term()], impl=impl)
    return y, *torch.autograd.grad(y, [problem.x, *([] if term is None else own.values())], problem.dy)


def chosen(problem: Problem, own: dict[str, Tensor], k: int, impl: str | None = None) -> Tensor:
    """The experts of each token, as both arms choose them."""
    found: list[Tensor] = []

    def look(p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        found.append(choose(k, p, x)[0])
        return found[0], torch.ones_like(p[..., :k], dtype=torch.float32)

    with torch.no_grad():
        zero = Grouped(own["A"], own["B"], ranks_of(own), look, 0.0, standardised(own["V"]))
        adapted_linear(problem.x, problem.W, None, [zero], impl=impl)
    return found[0]


def formula(problem: Problem, own: dict[str, Tensor], index: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """y and every gradient of sum_j w_j B_e A_e x, expert by expert over the tokens that use it."""
    p = {n: t.detach().to(dtype).requires_grad_() for n, t in own.items()}
    x = problem.x.detach().to(dtype).requires_grad_()
    norm = functools.partial(torch.nn.functional.layer_norm, normalized_shape=x.shape[-1:])
    w = torch.softmax((norm(x) @ norm(p["V"]).T / x.shape[-1] ** 0.5).gather(-1, index), -1)
    low = torch.zeros(len(x), problem.W.shape[0], dtype=dtype, device=x.device)
    for e in index.unique().tolist():
        tokens, places = (index == e).nonzero(as_tuple=True)
        at = slice(e * problem.rank, (e + 1) * problem.rank)
        low = low.index_add(0, tokens, w[tokens, places, None] * (x[tokens] @ p["A"][at].T @ p["B"][:, at].T))
    grads = torch.autograd.grad(low, [x, *p.values()], problem.dy.to(dtype))
    y, dx = problem.base[dtype]
    return {"y": y + low.detach(), "dx": dx + grads[0]} | {f"d{n}": g for n, g in zip(p, grads[1:], strict=True)}


def switch(args: argparse.Namespace, rounds: int) -> Iterator[Row]:
    for dtype, size, tokens in itertools.product(args.dtypes, SHAPES, args.tokens):
        problem = Problem(tokens, size, dtype)
        for k, total in itertools.product(args.k, args.totals):
            own = problem.experts(total)
            index = chosen(problem, own, k)
            exact, plain = (formula(problem, own, index, d) for d in (torch.float64, dtype))
            names = ("y", "dx", *(f"d{n}" for n in own))
            run = {n: functools.partial(step, problem, own, term) for n, term in terms(own, k).items()}
            checked = {n: distance(dict(zip(names, call(), strict=True)), exact, plain) for n, call in run.items()}
            right = {n: call for n, call in run.items() if not checked[n][1]}
            seconds = interleaved({FROZEN: functools.partial(step, problem, {}, None), **right}, rounds=rounds)
            head = {
                "bench": "experts switch", "device": "cpu", "shape": [tokens, *size], "dtype": name_of(dtype), "experts": total // RANK,
                "rank": RANK, "total": total, "k": k, "active": k * RANK, "rounds": rounds,
            }  # fmt: skip
            for name in run:
                row = head | {"arm": name, "error": checked[name][0], "wrong": checked[name][1]}
                if name in seconds:
                    row |= {"ratio": over(seconds, name, FROZEN)}
                    if name == GROUPED and ALL in seconds:
                        row |= {"over_all": over(seconds, GROUPED, ALL)}
                yield row


def over(seconds: dict[str, list[float]], name: str, other: str) -> list[float]:
    """Quartiles of the quotient within a round."""
    return quartiles([a / b for a, b in zip(seconds[name], seconds[other], strict=True)])


def limits(rows: list[Row]) -> dict[tuple[str, int], int | None]:
    """(dtype, active ranks) -> the total rank from which grouped was quicker at every shape and number of tokens, by more than the
    quartiles of its rounds; None where there was none.
    """
    found: dict[tuple[str, int], int | None] = {}
    own = [r for r in rows if r["bench"] == "experts switch" and "over_all" in r]
    for dtype, active in dict.fromkeys((r["dtype"], r["active"]) for r in own):
        best = None
        for total in sorted({r["total"] for r in own}, reverse=True):
            here = [r["over_all"][2] < 1 for r in own if (r["dtype"], r["active"], r["total"]) == (dtype, active, total)]
            if not here or not all(here):
                break
            best = total
        found[dtype, active] = best
    return found


def cost(args: argparse.Namespace, rounds: int) -> Iterator[Row]:
    for dtype in args.dtypes:
        shape = Shape(*COST, dtype=dtype)
        x, dy, linear = inputs(shape)
        found = {arm.name: arm for arm in arms(shape, x, linear)}
        checked = {name: check(arm, x, dy, linear) for name, arm in found.items()}
        seconds = interleaved({n: functools.partial(arm_step, a, x, dy) for n, a in found.items() if not checked[n][1]}, rounds=rounds)
        for name, arm in found.items():
            row: Row = {
                "bench": "experts cost", "arm": name, "library": arm.library, "adapter_dtype": arm.adapter_dtype, "device": "cpu",
                "shape": list(COST), "dtype": name_of(dtype), "experts": EXPERTS, "rank": RANK, "rounds": rounds,
                "error": checked[name][0], "wrong": checked[name][1],
                "saved_bytes": bytes_saved(functools.partial(arm.forward, x), [x, *linear.parameters(), *arm.leaves.values()]),
            }  # fmt: skip
            if name in seconds:
                row |= {"ratio": over(seconds, name, FROZEN)}
                row |= {"over_lora": over(seconds, name, ONE)} if ONE in seconds else {}
            yield row


def arm_step(arm: Arm, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    y = arm.forward(x)
    return y, *torch.autograd.grad(y, [x, *arm.leaves.values()], dy)


def check(arm: Arm, x: Tensor, dy: Tensor, linear: Any) -> tuple[float, list[str]]:
    """distance() of the arm from its formula in fp64."""
    names = ("y", "dx", *(f"d{n}" for n in arm.leaves))
    found = [dict(zip(names, arm_step(arm, x, dy), strict=True))]
    for dtype in (torch.float64, x.dtype):
        own = {n: t.detach().to(dtype).requires_grad_() for n, t in arm.leaves.items()}
        leaf = x.detach().to(dtype).requires_grad_()
        base = leaf @ linear.weight.to(dtype).T + linear.bias.to(dtype)
        y = arm.formula(leaf, own, base)
        grads = torch.autograd.grad(y, [leaf, *own.values()], dy.to(dtype))
        found.append(dict(zip(names, (y.detach(), *grads), strict=True)))
    return distance(*found)


def report(rows: list[Row]) -> str:
    parts = []
    own = [r for r in rows if r["bench"] == "experts switch"]
    for dtype, *size in dict.fromkeys((r["dtype"], *r["shape"][1:]) for r in own):
        totals = sorted({r["total"] for r in own})
        lines = [f"Grouped / all experts, median [quartiles]; {dtype}, {size[0]} -> {size[1]}\n"]
        lines += [_line(["tokens", "k", *(f"R = {t}" for t in totals)]), _line(["---"] * (2 + len(totals)))]
        for tokens, k in dict.fromkeys((r["shape"][0], r["k"]) for r in own):
            here = {r["total"]: r for r in own if r["arm"] == GROUPED and (r["dtype"], *r["shape"], r["k"]) == (dtype, tokens, *size, k)}
            lines.append(_line([str(tokens), str(k), *(_cell(here.get(t, {}), "over_all") for t in totals)]))
        parts.append("\n".join(lines))
    if own:
        said = [f"{d}, {a} active ranks: {'none' if t is None else t}" for (d, a), t in limits(rows).items()]
        parts.append("Total rank from which grouped was quicker everywhere: " + "; ".join(said))
    own = [r for r in rows if r["bench"] == "experts cost"]
    for dtype in dict.fromkeys(r["dtype"] for r in own):
        lines = [f"{EXPERTS} experts of rank {RANK} at {COST}, {dtype}, median [quartiles]\n"]
        lines += [_line(["arm", "/ frozen", "/ one LoRA", "kept, MB", "adapters", "error"]), _line(["---"] * 6)]
        for r in own:
            if r["dtype"] == dtype:
                kept = f"{r['saved_bytes'] / 1e6:.1f}"
                lines.append(_line([r["arm"], _cell(r, "ratio"), _cell(r, "over_lora"), kept, r["adapter_dtype"], f"{r['error']:.1e}"]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(row: Row, key: str) -> str:
    if key in row:
        low, middle, high = row[key]
        return f"{middle:.2f} [{low:.2f}, {high:.2f}]"
    return f"WRONG: {', '.join(row['wrong'])}" if row.get("wrong") else "-"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rounds instead of {ROUNDS}")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--only", choices=["switch", "cost"], action="append", help="repeatable")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--tokens", type=int, action="append", help=f"of the switch, instead of {TOKENS}")
    parser.add_argument("--total", type=int, action="append", help=f"total rank of the switch, a multiple of {RANK}, instead of {TOTALS}")
    parser.add_argument("--k", type=int, action="append", help=f"of the switch, instead of {PLACES}")
    parser.add_argument("--save", action="store_true", help=f"append the rows to bench/results/{FILE.name}")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.dtypes = [DTYPES[d] for d in args.dtype or DTYPES]
    args.tokens, args.totals, args.k = args.tokens or TOKENS, args.total or TOTALS, args.k or PLACES
    rounds = args.rounds or (QUICK if args.quick else ROUNDS)
    parts = {"switch": switch, "cost": cost}
    rows = []
    for name in args.only or parts:
        for row in parts[name](args, rounds):
            emit(row, FILE if args.save else None)
            rows.append(row)
    print("\n" + report(rows))


if __name__ == "__main__":
    main()
