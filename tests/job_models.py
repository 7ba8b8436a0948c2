"""Tiny models with a tokenizer, and rows in every file format, for the tests of the main job."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch

WORDS = tuple(f"w{c}" for c in "abcdefghijklmnopqrstuvwx")


def tiny_model(folder: Path, kind: str) -> tuple[Path, Any]:
    """Save a random two-block BERT or GPT-2 of width 16 without a head for the task; returns its folder and tokenizer."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {w: k for k, w in enumerate(("[PAD]", "[UNK]", "[END]", *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "[UNK]", "eos_token": "[END]"} | ({"pad_token": "[PAD]"} if kind == "bert" else {})
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=64, initializer_range=0.3,
        )  # fmt: skip
        model = transformers.BertModel(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=len(vocabulary),
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=64,
            bos_token_id=2,
            eos_token_id=2,
            initializer_range=0.3,
        )
        model = transformers.GPT2LMHeadModel(config)
    path = folder / kind
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path, tokenizer


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    """Rows (text, label) in the format of the path's suffix; no suffix is a folder of `datasets`."""
    records = [{"text": t, "label": y} for t, y in rows]
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
            writer.writerows([("text", "label"), *rows])
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        import datasets

        table = datasets.Dataset.from_list(records)
        if path.suffix == ".parquet":
            table.to_parquet(path)
        else:
            table.save_to_disk(str(path))
    return path
