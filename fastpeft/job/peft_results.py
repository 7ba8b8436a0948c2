"""A run in the schema of PEFT's method comparison (method_comparison/*/results/*.json of huggingface/peft, the fields of September 2026).

null is what was not measured, or what there is not: times (a comparison's runs share a machine with whatever else runs there), text
generation, commits. `sha` is a Git commit there, and here a sha256 of the model's weights and of the texts' tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from fastpeft.job.arms import FROZEN, PEFT, peft_config, peft_counterpart


def result(row: Mapping[str, Any], run: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """row, run: of compare_page.gather.   settings: of the folder."""
    return {"run_info": _run_info(row, run, settings), "train_info": _train_info(row, run, settings), "meta_info": _meta_info(row, run, settings)}


def _run_info(row: Mapping[str, Any], run: Mapping[str, Any], s: Mapping[str, Any]) -> dict[str, Any]:
    steps = len(run["losses"])
    config = {
        "model_id": s["model name"],
        "dtype": s["dtype"],
        "max_seq_length": s["max_length"],
        "batch_size": s["batch_size"],
        "batch_size_eval": 2 * s["batch_size"],
        "max_steps": steps,
        "eval_steps": _per_epoch(run),
        "compile": False,
        "use_gc": False,
        "query_template": None,
        "seed": run["seed"],
        "grad_norm_clip": s["clip"],
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {"lr": run["rate"], "weight_decay": s["weight_decay"]},
        "lr_scheduler": "linear",
        "use_amp": False,
        "autocast_adapter_dtype": None if row["arm"] == FROZEN else True,
        "generation_kwargs": None,
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }
    return {
        "created_at": run["when"],
        "total_time": None,
        "experiment_name": f"{row['title']}/{s['model name']}",
        "peft_branch": None,
        "peft_worktree_is_dirty": None,
        "train_config": config,
        "peft_config": adapter_config(row, s),
        "error_msg": run.get("error", ""),
    }


def adapter_config(row: Mapping[str, Any], s: Mapping[str, Any]) -> dict[str, Any] | None:
    """PEFT's own where it has the method with these options; else the recipe's name as the type, its options, and whose it is. None: no adapter."""
    if row["arm"] == FROZEN:
        return None
    if row["arm"] == PEFT or peft_counterpart(row["method"], row["options"]):
        config = peft_config(row["method"], row["options"], s["target_modules"], []).to_dict()
        return {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()} | {"task_type": "SEQ_CLS"}
    own = {"task_type": "SEQ_CLS", "peft_type": row["method"].upper(), "library": "fastpeft", "target_modules": s["target_modules"]}
    return own | {k: v for k, v in _options(row).items() if k not in own}


def _options(row: Mapping[str, Any]) -> dict[str, Any]:
    from fastpeft.registry import get_recipe

    return get_recipe(row["method"]).options | dict(row["options"])


def _train_info(row: Mapping[str, Any], run: Mapping[str, Any], s: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "accelerator_memory_reserved_avg": None,
        "accelerator_memory_max": run.get("accelerator_bytes"),
        "accelerator_memory_reserved_99th": None,
        "train_time": None,
        "file_size": run.get("file_bytes"),
        "num_trainable_params": row["trainable"],
        "num_total_params": row["parameters"],
        "status": "success",
        "metrics": _metrics(run, s),
    }


def _per_epoch(run: Mapping[str, Any]) -> int:
    return max(1, len(run["losses"]) // max(1, len(run["scores"]) - 1))


def _metrics(run: Mapping[str, Any], s: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry for each evaluation after an epoch, and a last one. Valid and test are the same held-out texts."""
    size, per = s["batch_size"], _per_epoch(run)
    texts = s["examples"][0] - sum(run["aside"].values())
    unmeasured = dict.fromkeys(("train time", "eval time", "tokens / sec", "mem allocated avg", "mem reserved avg", "elapsed time"))
    found, epochs = [], len(run["scores"]) - 1
    for k in range(1, epochs + 1):
        last = k == epochs
        step = len(run["losses"]) if last else k * per
        own = {"train loss": statistics.fmean(run["losses"][(k - 1) * per : step]), "train samples": min(k * texts, step * size)}
        found.append({"step": step, "valid accuracy": run["scores"][k][1]} | own | unmeasured)
    end = {k: found[-1][k] for k in ("step", "train loss", "train samples")}
    return [*found, end | {"test accuracy": run["scores"][-1][1], "train total tokens": None, "forgetting": None}]


def _meta_info(row: Mapping[str, Any], run: Mapping[str, Any], s: Mapping[str, Any]) -> dict[str, Any]:
    names = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
    has = {k: v for k, v in run["versions"].items() if v != "not installed"}
    system = dict(row["system"])
    pytorch = system.pop("pytorch")
    data = {k: {"sha": s[f"{k} examples"], "created_at": None} for k in ("training", "evaluation")}
    return {
        "model_info": {"sha": s["model sha256"], "created_at": None},
        "dataset_info": data,
        "package_info": {f"{n}-{what}": has.get(n) if what == "version" else None for n in names for what in ("version", "commit-hash")},
        "system_info": system,
        "pytorch_info": pytorch,
    }
