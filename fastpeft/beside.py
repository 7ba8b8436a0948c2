"""The adapter beside an FFN: y = FFN(x) + sum of terms(x) + residual * x, by plain-function hooks.

The hooks read what they need from the module that they are called on, so a deepcopy of the model is independent of it. A
module FFN has one hook; a pair of linears has two: the first hands its input to the adapter, the last adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastpeft.adapter import Adapter
from fastpeft.ffn import FFN
from fastpeft.ops.kron import product
from fastpeft.registry import Method
from fastpeft.terms import Bias, Kron

# where the linears of a pair keep their block's adapter: outside the module tree, as the block holds it there already
_LINK = "_fastpeft_ffn_adapter"


class FFNAdapter(Adapter):
    """The methods beside one FFN, by recipe name; forward(x, y) is the sum."""

    def __init__(self, methods: Mapping[str, Method], ffn: FFN):
        super().__init__(methods)
        self.ffn_name, self.width = ffn.name, ffn.width
        # the pair's input, in a tuple: as an attribute a Parameter would become one of this module
        self.taken: tuple[Any] | None = None

    def forward(self, x: Any, y: Any) -> Any:
        """y + terms(x) + residual * x in y's dtype; of a tuple y the first entry takes the sum.

        Raises TypeError where x or y is no tensor, ValueError where x or y has another width or shape than expected.
        """
        if isinstance(y, tuple):
            if not y:
                raise TypeError(f"{self._who()} gave an empty tuple; needed is its output.")
            first = self.forward(x, y[0])
            fields = getattr(y, "_fields", None)
            return (first, *y[1:]) if fields is None else type(y)(first, *y[1:])
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            raise TypeError(
                f"{self._who()} was called with {type(x).__name__} and gave {type(y).__name__}; needed are tensors (or a tuple "
                "that begins with one). Exclude it with exclude_modules."
            )
        if x.shape != y.shape or x.shape[-1:] != (self.width.features,):
            raise ValueError(
                f"{self._who()} was called with {tuple(x.shape)} and gave {tuple(y.shape)}; needed are equal shapes [..., "
                f"{self.width.features}]. Exclude it with exclude_modules."
            )
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return self._sum(x, y)
        with torch.autocast(device, enabled=False):
            return self._sum(x, y)

    def _sum(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.to(y.dtype)
        for method in self.methods().values():
            for term in method.terms(self.width):
                if isinstance(term, Kron):
                    y = y + product(x, term.C, term.D, term.scale)
                elif isinstance(term, Bias):
                    y = y + term.b.to(y.dtype)
                else:
                    raise TypeError(
                        f"{self._who()}: a {type(term).__name__} term; only Kron and Bias stand beside an FFN."
                    )
            factor = method.residual()
            if factor is not None:
                # [1] and not 0-d: a wider factor then stays wide, and so does its gradient
                y = torch.addcmul(y, x, factor).to(y.dtype)
        return y

    def _who(self) -> str:
        return f"{'+'.join(self.names)}: the FFN {self.ffn_name!r}"


def attach(model: nn.Module, ffn: FFN, adapter: FFNAdapter) -> list[RemovableHandle]:
    """Give the FFN its adapter at `<name>.adapter`; returns the handles of its hooks, which detach takes.

    Ours come before a user's own forward hooks, which see the sum as they would see an adapted linear's output.
    """
    site = model.get_submodule(ffn.name)
    site.adapter = adapter.train(site.training)
    if ffn.first is None or ffn.last is None:
        return [site.register_forward_hook(_add, prepend=True, with_kwargs=True)]
    first, last = (model.get_submodule(n) for n in ffn.linears)
    for linear in (first, last):
        linear.__dict__[_LINK] = adapter
    return [
        first.register_forward_pre_hook(_take, with_kwargs=True),
        last.register_forward_hook(_add_taken, prepend=True),
    ]


def detach(model: nn.Module, ffn: FFN, handles: list[RemovableHandle]) -> None:
    """Undo attach."""
    for handle in handles:
        handle.remove()
    for name in ffn.linears:
        del model.get_submodule(name).__dict__[_LINK]
    del model.get_submodule(ffn.name).adapter


def _add(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    adapter = module.adapter
    return adapter(_input(args, kwargs), output) if adapter.enabled else None


def _take(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    adapter = module._fastpeft_ffn_adapter
    if adapter.enabled:
        adapter.taken = (_input(args, kwargs),)


def _add_taken(module: Any, args: tuple[Any, ...], output: Any) -> Any:
    adapter = module._fastpeft_ffn_adapter
    if not adapter.enabled:
        return None
    # given back before anything is saved for backward: a checkpoint's recompute may stop there and never come back
    taken, adapter.taken = adapter.taken, None
    if taken is None:
        raise RuntimeError(
            f"{adapter._who()}: its last linear ran without its first, so there is no input to read; exclude it with "
            "exclude_modules."
        )
    return adapter(taken[0], output)


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The FFN's input: its first argument, positional or not."""
    return args[0] if args else next(iter(kwargs.values()), None)
