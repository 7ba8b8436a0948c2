"""Supervised fine-tuning of a small random Llama under TRL's SFTTrainer and PEFT, with or without fastpeft's one line.

    python examples/sft_llama.py --method dora                    # fastpeft.accelerate(model) before training
    python examples/sft_llama.py --method dora --no-accelerate    # the same script without it
    python examples/sft_llama.py --frozen                         # no adapter: the model's first norm alone trains

Nothing is downloaded: the text is the docstrings of the running Python's standard library (the main job's built-in data), the
tokenizer is trained on them, the model is random; trl, peft and datasets must be installed. Everything is fp32 on the CPU, PEFT's
adapters too. Both runs start from the same numbers and see the same batches; with --dropout the masks differ, being drawn by
another generator, and so do the losses. examples/compare_sft.py runs them side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from functools import cache
from typing import Any, TextIO

import datasets
import peft
import torch
import transformers
import trl

import fastpeft
from fastpeft.job.measure import after_warm_up, bytes_saved
from fastpeft.job.memory import peak_resident
from fastpeft.job.stdlib import harvest

METHODS = ("lora", "dora", "lokr")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# docstrings per package: all of them
TEXTS = 10_000
EOS, PAD = "</s>", "<pad>"


def positive(text: str) -> int:
    if (found := int(text)) < 1:
        raise ValueError
    return found


def options(parser: argparse.ArgumentParser) -> None:
    """What a run and a comparison of two both take."""
    add = parser.add_argument
    add("--steps", type=positive, default=40)
    add("--batch", type=positive, default=4, help="packed sequences per step")
    add("--length", type=positive, default=256, help="tokens per sequence")
    add("--hidden", type=positive, default=512)
    add("--intermediate", type=positive, default=1408)
    add("--layers", type=positive, default=4)
    add("--heads", type=positive, default=8)
    add("--vocab", type=positive, default=4096)
    add("--rank", type=positive, default=16)
    add("--dropout", type=float, default=0.0, help="LoRA's and DoRA's; the masks are not PEFT's, so the losses differ then")
    add("--lr", type=float, default=1e-3)
    add("--checkpointing", action="store_true", help="recompute activations in backward (TRL's own default)")
    add("--threads", type=positive, default=torch.get_num_threads())
    add("--seed", type=int, default=0)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--method", choices=METHODS, default="lora")
    made.add_argument("--accelerate", action=argparse.BooleanOptionalAction, default=True)
    options(made)
    made.add_argument("--frozen", action="store_true", help="no adapter; all linear layers frozen, and gradients pass through each")
    made.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    made.add_argument("--turns", action="store_true", help="wait for a line on standard input before each step (compare_sft.py)")
    return made


@cache
def texts() -> list[str]:
    """Docstrings in a fixed random order, each ended."""
    found = harvest(per_class=TEXTS)[0]
    return [t + EOS for t in random.Random(0).sample(found, len(found))]


@cache
def tokenizer(size: int) -> Any:
    """A byte-level BPE of `size` tokens at most, trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts(), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, pad_token=PAD)


def llama(args: argparse.Namespace, words: Any) -> Any:
    """A random Llama in fp32."""
    torch.manual_seed(args.seed)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=args.length,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return transformers.LlamaForCausalLM(config).float()


def adapter(args: argparse.Namespace) -> Any:
    """PEFT's config of the method: all linear layers but the output head, alpha = 2 rank."""
    common = {"r": args.rank, "target_modules": LINEARS, "task_type": "CAUSAL_LM"}
    if args.method == "lokr":
        return peft.LoKrConfig(alpha=2 * args.rank, **common)
    return peft.LoraConfig(lora_alpha=2 * args.rank, lora_dropout=args.dropout, use_dora=args.method == "dora", **common)


def build(args: argparse.Namespace, folder: str, callbacks: list[Any]) -> Any:
    """The trainer."""
    words = tokenizer(args.vocab)
    model = llama(args, words)
    if args.frozen:
        # a norm below every linear layer: backward crosses them all, as an adapter's does
        model.requires_grad_(False).model.layers[0].input_layernorm.requires_grad_(True)
    else:
        model = peft.get_peft_model(model, adapter(args))
        if args.accelerate:
            fastpeft.accelerate(model)  # the one line
    arguments = trl.SFTConfig(
        output_dir=folder, max_steps=args.steps, per_device_train_batch_size=args.batch, learning_rate=args.lr,
        max_length=args.length, packing=True, packing_strategy="wrapped", gradient_checkpointing=args.checkpointing,
        bf16=False, use_cpu=True, seed=args.seed, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"text": texts()})
    trainer = trl.SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=words, callbacks=callbacks)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


class Clock(transformers.TrainerCallback):
    """Seconds of each step, from its first forward to the cleared gradients, on the clock and on the processor, and its loss.

    turns: where to write one line of JSON before each step and after the last one, and then to wait for a line on standard input
    before the step; so a comparison has one process at work at a time. None: no waiting.
    """

    def __init__(self, turns: TextIO | None = None):
        self.turns = turns
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.turns is not None:
            self.say(len(self.seconds))
            if not sys.stdin.readline():
                raise SystemExit("sft_llama: standard input ended before training did")
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began[0])
        self.cpu.append(time.process_time() - self.began[1])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            self.losses.append(logs["loss"])

    def say(self, value: Any) -> None:
        print(json.dumps(value), file=self.turns, flush=True)


def run(args: argparse.Namespace, turns: TextIO | None = None) -> dict[str, Any]:
    """Train once. seconds, cpu_seconds (all threads) and losses of each step; bytes: peak_resident (of this process), loaded (before the first step), saved.

    fused_calls, peft_calls: of the training alone.   layers: adapted ones.
    """
    torch.set_num_threads(args.threads)
    clock = Clock(turns)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(args, folder, [clock])
        own = [p for p in trainer.model.parameters() if p.requires_grad]
        fastpeft.reset_calls()
        loaded = peak_resident()
        trainer.train()
        peak, fused, stock = peak_resident(), fastpeft.fused_calls(), fastpeft.peft_calls()
        if turns is not None:
            clock.say(len(clock.seconds))
            sys.stdin.readline()
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        owned = [*trainer.model.parameters(), *trainer.model.buffers(), *batch.values()]
        saved = bytes_saved(lambda: trainer.compute_loss(trainer.model, batch), owned)
    return {
        "method": args.method,
        "accelerate": args.accelerate and not args.frozen,
        "frozen": args.frozen,
        "adapter_dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in own})),
        "trainable": sum(p.numel() for p in own),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "layers": sum(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in trainer.model.modules()),
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu,
        "losses": clock.losses,
        "fused_calls": fused,
        "peft_calls": {" ".join(k): n for k, n in stock.items()},
        "saved": saved,
        "loaded": loaded,
        "peak_resident": peak,
    }


def show(result: dict[str, Any]) -> str:
    how = "accelerated" if result["accelerate"] else "frozen model" if result["frozen"] else "stock PEFT"
    step, losses = statistics.median(after_warm_up(result["seconds"])), result["losses"]
    return "\n".join(
        (
            f"{result['method']}, {how}: {result['layers']} layers, {result['trainable']:,} of {result['parameters']:,} parameters train, "
            f"adapter in {result['adapter_dtype']}",
            f"step {1e3 * step:.1f} ms (median), loss {losses[0]:.4f} -> {losses[-1]:.4f} over {len(losses)} steps",
            f"saved for backward {result['saved'] / 2**20:.1f} MiB, peak of the process {result['peak_resident'] / 2**20:.0f} MiB "
            f"({result['loaded'] / 2**20:.0f} before the first step)",
            f"fused forwards {result['fused_calls'] or 0}, PEFT's own {result['peft_calls'] or 0}",
        )
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        result = run(args, out if args.turns else None)
    print(json.dumps(result) if args.json else show(result), file=out, flush=True)
    return result


if __name__ == "__main__":
    main()
