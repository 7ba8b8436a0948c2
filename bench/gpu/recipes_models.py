"""Of stage recipes: a tiny Llama with each routed method: logits and gradients, and generation with and without a cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastpeft
from bench.gpu.common import Row, Run, Task
from bench.gpu.recipes import attached, judged, placed, roundings
from bench.machine import name_of
from fastpeft.ops.family import implementation

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "hydralora": ("hydralora", {"rank": 2, "alpha": 2, "heads": 3}),
    "moa": ("moa", {"rank": 4, "alpha": 4, "experts": 3, "prompt": "all", "train_router": False}),
    "moa by vote": ("moa", {"rank": 4, "experts": 3, "choice": "vote", "prompt": "all", "train_router": False}),
    "phatgoose": ("phatgoose", {"rank": 4, "alpha": 4, "experts": 4, "k": 2}),
    "phatgoose one": ("phatgoose", {"rank": 4, "alpha": 4, "experts": 3, "k": 1}),
    "lora": ("lora", {"rank": 4, "alpha": 4}),
    "dora": ("dora", {"rank": 4, "alpha": 4}),
}


def tasks(run: Run) -> Iterator[Task]:
    for name, (method, _) in MODELS.items():
        for dtype in run.dtypes:
            if "vote" not in name:
                row = {"check": "llama", "what": method, "case": f"{name}, {name_of(dtype)}"}
                yield row, lambda name=name, dtype=dtype: _gradients(run, name, dtype)
        for cache in (True, False):
            row = {"check": "generate", "what": method, "case": f"{name}, {'' if cache else 'no '}cache"}
            yield row, lambda name=name, cache=cache: _generates(run, name, cache)


def llama(name: str, dtype: torch.dtype) -> Any:
    """On the CPU, the same in each call."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(1)
    model: Any = transformers.LlamaForCausalLM(config)
    model = model.to(dtype)
    method, options = MODELS[name]
    fastpeft.adapt(model, method, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad or n.startswith("adapter_shared"):
                # routers and gates that disagree clearly
                size = 1.0 if n.startswith("adapter_shared") or n.endswith("phatgoose.V") else 0.2
                p.add_((size * torch.randn(p.shape, generator=generator)).to(p))
    return attached(model)


def prompts() -> tuple[Tensor, Tensor]:
    """Rows of 5, 3 and 4 tokens, padded on the left."""
    ids = torch.randint(2, 64, (3, 5), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[2, :1] = 0
    return ids.masked_fill(mask == 0, 1), mask


def _gradients(run: Run, name: str, dtype: torch.dtype) -> Row:
    """Logits, the loss's gradients. Layers of the model count as adapted linears: 7 in each of 2 blocks, and attention."""
    model = llama(name, dtype)

    def outcome(m: Any, device: str, impl: str) -> dict[str, Tensor]:
        ids, mask = (t.to(device) for t in prompts())
        own = {n: p for n, p in m.named_parameters() if p.requires_grad}
        with implementation(impl):
            out = m.train()(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
            grads = torch.autograd.grad(out.loss, list(own.values()), allow_unused=True)
        found = {"logits": out.logits[mask == 1].detach()}
        found |= {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(own.items(), grads, strict=True)}
        return {n: t.double().cpu() for n, t in found.items()}

    truth, plain = (outcome(placed(model, "cpu", d), "cpu", "torch") for d in (torch.float64, None))
    found = {}
    for impl in ("triton", "torch"):
        row = judged(outcome(placed(model, run.device), run.device, impl), truth, plain, roundings(dtype, 16))
        found[impl] = row | {"wrong": f"{impl}: {row['wrong']}" if row["wrong"] else ""}
    return {
        "error": max(r["error"] for r in found.values()),
        "right": all(r["right"] for r in found.values()),
        "wrong": "; ".join(r["wrong"] for r in found.values() if r["wrong"]),
    }


def _generates(run: Run, name: str, cache: bool) -> Row:
    """Greedy tokens of fp32 models are equal. Where they part, the CPU's two best logits must be a tie to 1e-4."""
    model = llama(name, torch.float32)
    ids, mask = prompts()
    want, logits = _generate(placed(model, "cpu"), ids, mask, cache, "torch", 2 if run.dry else 8)
    got, _ = _generate(placed(model, run.device), ids.to(run.device), mask.to(run.device), cache, "triton", 2 if run.dry else 8)
    if torch.equal(got, want):
        return {"right": True, "wrong": ""}
    row = int((got != want).any(1).nonzero()[0])
    at = int((got != want)[row].nonzero()[0])
    best = logits[at][row].topk(2).values
    gap = float(best[0] - best[1])
    return {"error": gap, "right": gap <= 1e-4, "wrong": f"row {row} parts at new token {at}, where the CPU's best are {gap:.1e} apart"}


def _generate(model: Any, ids: Tensor, mask: Tensor, cache: bool, impl: str, new: int) -> tuple[Tensor, list[Tensor]]:
    with implementation(impl):
        out = model.eval().generate(
            ids, attention_mask=mask, use_cache=cache, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=1,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    return out.sequences[:, ids.shape[1] :].cpu(), [t.float().cpu() for t in out.logits]
