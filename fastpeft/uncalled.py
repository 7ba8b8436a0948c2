"""Linear layers whose owner reads their weight and does not call them, so that an adapter in them would do nothing, silently."""

from __future__ import annotations

import importlib.util
import re

from torch import nn

# of Transformers: the owner's class, and its linears that it hands to a product of its own
OWNERS = (
    (r"WavLMAttention", ("q_proj", "k_proj", "v_proj", "out_proj")),
    (r"\w*MHAttentionMap", ("k_proj", "k_linear")),  # DETR's masks: a convolution of size one
    (r"TDNNLayer", ("kernel",)),  # speaker verification: a convolution
    (r"MobileBertLMPredictionHead", ("dense", "decoder")),
)
# state-space mixers: dt_proj is read everywhere, out_proj where a kernel does several steps at once; PEFT refuses the latter too
MIXERS, READ = "amba|FalconH1|NemotronH", ("dt_proj", "out_proj")
# these are read by the kernels of one of these packages, and called where none is installed
BY_KERNELS, KERNELS = ("x_proj",), ("mamba_ssm", "kernels")


def why_uncalled(owner: nn.Module, leaf: str) -> str | None:
    """Why an adapter on the linear layer `leaf` of this module would be skipped; None where nothing is known against it."""
    kind = type(owner).__name__
    if isinstance(owner, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its out_proj's weight and never calls it, so an adapter would be skipped"
    # (a user's own class may have one of these names)
    theirs = type(owner).__module__.startswith("transformers")
    read = [leaf in leaves for pattern, leaves in OWNERS if theirs and re.fullmatch(pattern, kind)]
    if "A_log" in owner._parameters and re.search(MIXERS, kind):
        read += [leaf in READ, leaf in BY_KERNELS and any(map(importlib.util.find_spec, KERNELS))]
    if any(read):
        return f"{kind} hands its weight to a product or a kernel of its own and does not call it there, so an adapter would be skipped"
    return None
