"""A PEFT folder as one file of kohya's and LyCORIS' dialect (fastpeft.integrations.lycoris reads them). No model is needed.

LORA (rsLoRA, DoRA), LOHA and LOKR of linear layers. `alpha` stands in the file, for each layer; what the dialect cannot say is refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.checkpoint import load_adapter, some
from fastpeft.folder import PREFIX, CheckpointError, read_folder, replace_file
from fastpeft.patterns import by_pattern

# peft_type -> leaf in PEFT's folder -> leaf in the file
_LORA = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "lora_magnitude_vector": "dora_scale"}
_HADA = [f"hada_w{half}_{side}" for half in (1, 2) for side in "ab"]
_KRON = [f"lokr_w{half}{side}" for half in (1, 2) for side in ("", "_a", "_b")]
LEAVES: dict[str, dict[str, str]] = {"LORA": _LORA, "LOHA": {n: n for n in _HADA}, "LOKR": {n: n for n in _KRON}}


def to_lycoris(folder: str | os.PathLike[str], file: str | os.PathLike[str], *, prefix: str = "lycoris") -> list[str]:
    """Write the adapter of a PEFT folder to a .safetensors file; returns the names of its layers.

    prefix: of every key, `<prefix>_<module name with _ for .>` ("lora_unet", "lora_te", ...).
    FileNotFoundError; CheckpointError for a damaged folder, one that load_adapter would refuse whatever the model, another peft_type, tensors
    that have no place in such a file (biases, modules_to_save, embeddings, convolutions), and two layers whose names are the same with _
    for '.'. The file is whole or as it was.
    """
    from safetensors.torch import save

    folder = Path(folder)
    config, tensors, _ = read_folder(folder)
    kind = config["peft_type"]
    if kind not in LEAVES:
        raise CheckpointError(f"to_lycoris: {folder} is {kind}; kohya's and LyCORIS' files hold {', '.join(LEAVES)}.")
    layers, strange = _layers(tensors, LEAVES[kind])
    # an adapter without a layer of its own is no adapter
    if strange or not layers:
        raise CheckpointError(
            f"to_lycoris: {folder} holds {f'tensors that such a file has no place for: {some(strange)}' if strange else 'no adapter'}; "
            "train without biases and modules_to_save, and on linear layers alone."
        )
    missing = [f"{PREFIX}{site}.{leaf}" for site, leaves in layers.items() for leaf in _absent(leaves)]
    empty = [key for key, t in tensors.items() if not t.numel()]
    for what, names in (("missing", missing), ("of no element", empty)):
        if names:
            raise CheckpointError(f"to_lycoris: {folder} is damaged: {len(names)} {what}: {some(names)}.")
    heads: dict[str, str] = {}
    for site in layers:
        head = f"{prefix}_{site.replace('.', '_')}"
        if head in heads:
            raise CheckpointError(f"to_lycoris: {heads[head]} and {site} of {folder} have one name with _ for '.'; rename one of the modules.")
        heads[head] = site
    _check(folder, layers)
    found: dict[str, Tensor] = {}
    for head, site in heads.items():
        own = _layer(config, site, layers[site])
        found |= {f"{head}.{leaf}": t.contiguous() for leaf, t in own.items()}
    replace_file(Path(file), save(found, {"format": "pt"}))
    return list(layers)


def _layers(tensors: Mapping[str, Tensor], known: Mapping[str, str]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Site -> leaf in the file -> tensor; and the keys that are no such leaf of a linear layer."""
    layers: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        leaf = next((n for n in known if key.endswith(f".{n}")), None)
        if leaf is None or not key.startswith(PREFIX) or tensor.dim() != (1 if leaf == "lora_magnitude_vector" else 2):
            strange.append(key)
        else:
            site = key.removeprefix(PREFIX).removesuffix(f".{leaf}")
            layers.setdefault(site, {})[known[leaf]] = tensor
    return layers, strange


def _absent(leaves: Mapping[str, Tensor]) -> list[str]:
    """PEFT's names of what a layer with these leaves of the file needs and does not have; of LoKr, whose halves are whole or not, the sizes'."""
    for own in LEAVES.values():
        named = {leaf: name for name, leaf in own.items()}
        if not leaves.keys() <= named.keys():
            continue
        if own is not LEAVES["LOKR"]:
            return [named[leaf] for leaf in named if leaf not in leaves and leaf != "dora_scale"]
        halves = [(f"lokr_w{half}", f"lokr_w{half}_a", f"lokr_w{half}_b") for half in (1, 2)]
        return [n for whole, *pair in halves if whole not in leaves for n in ([whole] if leaves.keys().isdisjoint(pair) else pair) if n not in leaves]
    return []


def _check(folder: Path, layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """CheckpointError for what load_adapter refuses in a model of these layers and no others: config and tensors held against each other."""
    model = nn.Module()
    for site, leaves in layers.items():
        out_features, in_features = _sides(leaves)
        parent = model
        for part in site.split(".")[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        wide = torch.float64 if any(t.dtype is torch.float64 for t in leaves.values()) else torch.float32
        parent.add_module(site.rpartition(".")[2], nn.Linear(in_features, out_features, device="meta", dtype=wide))
    load_adapter(model, folder)


def _sides(leaves: Mapping[str, Tensor]) -> tuple[int, int]:
    """(out, in) of the layer that these leaves say of themselves."""
    if "lora_up.weight" in leaves:
        return leaves["lora_up.weight"].shape[0], leaves["lora_down.weight"].shape[1]
    if "hada_w1_a" in leaves:
        return leaves["hada_w1_a"].shape[0], leaves["hada_w1_b"].shape[1]
    rows = [leaves.get(f"lokr_w{half}_a", leaves.get(f"lokr_w{half}")).shape[0] for half in (1, 2)]
    columns = [leaves.get(f"lokr_w{half}_b", leaves.get(f"lokr_w{half}")).shape[1] for half in (1, 2)]
    return math.prod(rows), math.prod(columns)


def _layer(config: Mapping[str, Any], site: str, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the file says of a layer, its alpha included."""
    lora = config["peft_type"] == "LORA"
    rank = by_pattern(site, config.get("rank_pattern") or {}, config["r"])
    alpha = by_pattern(site, config.get("alpha_pattern") or {}, config["lora_alpha" if lora else "alpha"])
    scale = alpha / math.sqrt(rank) if lora and config.get("use_rslora") else alpha / rank
    own = dict(leaves)
    if "dora_scale" in own:
        own["dora_scale"] = own["dora_scale"][:, None]
    thin = next((own[n].shape[0] for n in ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b") if n in own), None)
    if thin is None:  # both halves whole: the file's reader takes the scale for 1
        own["lokr_w2"] = own["lokr_w2"] * scale
        thin = scale = 1
    wide = torch.promote_types(torch.float32, next(iter(leaves.values())).dtype)
    return own | {"alpha": torch.tensor(float(scale * thin), dtype=wide)}
