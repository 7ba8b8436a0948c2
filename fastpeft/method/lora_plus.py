"""LoRA+: LoRA, W + s B A, whose B learns `ratio` times as fast as A.   A [rank, in], B [out, rank] train; B starts at zero.

The layer is `lora` with all of its options; what the paper changes is the optimiser's groups, which the procedure
fastpeft.train.LoRAPlus makes: lr of A and all else, ratio * lr (16 by default) of B. Without it this trains as `lora` does.
A folder is a plain LoRA for PEFT; here it becomes `lora_plus` again.

Paper: arXiv 2402.12354.
"""

from __future__ import annotations

from typing import ClassVar

from fastpeft.method.lora import LoRA, peft_lora
from fastpeft.registry import Notes, PeftFormat, method


@method("lora_plus", paper="arXiv 2402.12354")
class LoRAPlus(LoRA):
    PROCEDURE = "LoRAPlus"
    NOTES: ClassVar = Notes(
        formula="y = x W^T + s (drop(x) A^T) B^T; learning rates lr of A, ratio * lr of B",
        defaults="LoRA's; ratio 16, the usual recommendation (the authors' README uses 20)",
        oracle="PEFT's create_loraplus_optimizer, 20 steps; the layer as lora's",
        deviations=(
            "What learns faster is told by role: a 1-D parameter is none of it, where PEFT and the authors take every one "
            "(compat_ndim1=True).",
            "Weight decay is the optimiser's, as in the authors' code; PEFT's helper ignores it and takes its own argument.",
            "Embeddings carry no adapter here, so their separate learning rate has no place.",
        ),
    )
    PEFT = PeftFormat("LORA", {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias"}, peft_lora)
