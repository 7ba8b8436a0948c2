"""The model of stage model, the adapters that are put on it and taken off, and the sequences it learns."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu.common import Run
from bench.machine import name_of
from fastpeft.ops.family import implementation

LAYERS = 32
# of the model whose loss is followed
LOSS_LAYERS = 2
RANK, ALPHA = 16, 32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FROZEN = "frozen"
# of the Markov chain, among the whole vocabulary, and how likely each state's successors are
STATES, CHANCES = 64, (0.7, 0.1, 0.1, 0.1)


def base_dtype(run: Run) -> torch.dtype:
    """bf16, which the interpreter cannot multiply: a rehearsal has fp16."""
    return torch.float16 if run.dry else torch.bfloat16


@dataclass(frozen=True)
class Size:
    layers: int
    vocab: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int


def large(run: Run) -> Size:
    return tiny() if run.dry else Size(LAYERS, 128256, 4096, 14336, 32, 8)


def small(run: Run) -> Size:
    return tiny() if run.dry else Size(LOSS_LAYERS, 32000, 4096, 14336, 32, 8)


def tiny() -> Size:
    return Size(2, 128, 64, 96, 4, 2)


@dataclass(frozen=True)
class ModelArm:
    """library: None for the frozen model.   adapters: None for the dtype of the base, else fp32.

    impl: FASTPEFT_IMPL while it runs.   autocast: dtype while its forward runs.
    """

    name: str
    library: str | None = None
    wide: bool = True
    impl: str | None = None
    autocast: torch.dtype | None = None

    def using(self) -> contextlib.AbstractContextManager[None]:
        """Around a whole step: checkpointing runs forwards within the backward."""
        return contextlib.nullcontext() if self.impl is None else implementation(self.impl)

    def loss(self, model: Any, tokens: Tensor) -> Tensor:
        if self.autocast is None:
            return model(input_ids=tokens, labels=tokens).loss
        with torch.autocast(tokens.device.type, dtype=self.autocast):
            return model(input_ids=tokens, labels=tokens).loss


def model_arms(run: Run) -> dict[str, ModelArm]:
    dtype = base_dtype(run)
    name = name_of(dtype)
    found = (
        ModelArm(FROZEN),
        ModelArm(f"PEFT, {name} adapters", "PEFT", wide=False),
        ModelArm(f"PEFT, float32 adapters, {name} autocast", "PEFT", autocast=dtype),
        ModelArm("PEFT, float32 adapters", "PEFT"),
        ModelArm("fastpeft, triton", "fastpeft", impl="triton"),
        ModelArm("fastpeft, torch", "fastpeft", impl="torch"),
    )
    return {arm.name: arm for arm in found}


def build(run: Run, size: Size) -> Any:
    """A frozen causal LM of random weights, made on the device, whose embeddings' output requires its gradient.

    So every arm, the frozen one too, computes dx through every layer, and the arms differ by the adapters
    alone. Without it an adapter arm would save the dx of layer 0's q, k, v and norm, under 0.5 % of a step.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=8192,
        initializer_range=0.02,
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(run.device):
        model: Any = AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=base_dtype(run)
        )
    model.requires_grad_(False)
    model.train()
    model.get_input_embeddings().register_forward_hook(lambda module, given, out: out.requires_grad_(True))
    place = torch.device(run.device).type
    stray = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.device.type != place]
    assert not stray, stray
    assert all(p.dtype == base_dtype(run) for p in model.parameters())
    return model


@contextlib.contextmanager
def adapted(base: Any, arm: ModelArm, broken: Callable[[], None]) -> Iterator[Any]:
    """The model with the arm's adapter, which is off again afterwards; broken: called where that fails."""
    try:
        model = _put_on(base, arm)
    except BaseException:
        broken()
        raise
    try:
        yield model
    finally:
        try:
            if arm.library == "PEFT":
                model.unload()
            elif arm.library == "fastpeft":
                import fastpeft

                fastpeft.unload(base)
            assert not any(p.requires_grad for p in base.parameters()), "an adapter stayed"
        except BaseException:
            broken()
            raise


def _put_on(base: Any, arm: ModelArm) -> Any:
    torch.manual_seed(1)
    if arm.library == "PEFT":
        import peft

        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM"
        )
        return peft.get_peft_model(base, config, autocast_adapter_dtype=arm.wide)
    if arm.library == "fastpeft":
        import fastpeft

        fastpeft.adapt(base, "lora", target_modules=list(TARGETS), rank=RANK, alpha=ALPHA, dropout=0.0)
    return base


def trained(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def set_start(model: Any, seed: int, dtype: torch.dtype) -> None:
    """The same start in every arm: A as Kaiming draws it, exact in `dtype`; B zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if "lora_A" in name or name.endswith(".A"):
            bound = p.shape[1] ** -0.5
            p.copy_(((2 * torch.rand(p.shape, generator=generator) - 1) * bound).to(dtype))
        else:
            assert "lora_B" in name or name.endswith(".B"), name
            p.zero_()


def sequences(size: Size, seed: int, count: int, length: int) -> Tensor:
    """[count, length] tokens of a fixed Markov chain over a few states; seed: of the walks."""
    fixed = torch.Generator().manual_seed(7)
    states = min(STATES, size.vocab // 8)
    tokens = torch.randperm(size.vocab, generator=fixed)[:states]
    successors = torch.stack([torch.randperm(states, generator=fixed)[: len(CHANCES)] for _ in range(states)])
    walk = torch.Generator().manual_seed(1000 + seed)
    turns = torch.multinomial(torch.tensor(CHANCES), count * length, replacement=True, generator=walk)
    turns = turns.view(length, count)
    at = [torch.randint(states, (count,), generator=walk)]
    for k in range(1, length):
        at.append(successors[at[-1], turns[k]])
    return tokens[torch.stack(at, 1)]


def free(run: Run) -> None:
    gc.collect()
    if run.cuda:
        torch.cuda.empty_cache()
