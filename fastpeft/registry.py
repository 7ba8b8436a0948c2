"""Methods and recipes: how a file in fastpeft/method/ becomes a name that users can type.

A *method* owns parameters and returns terms. A *recipe* is what a paper prescribes: method, start (initialisation),
procedures (what happens around an optimiser step) and defaults. `@method` registers a class together with its own recipe;
`recipe` adds further ones. Files in fastpeft/method are found by listing the folder on first use.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from fastpeft.terms import Term


@dataclass(frozen=True)
class Site:
    """Where a method is built: the layer's name and its base (shapes, norms, products; not the raw weight).

    dtype is the dtype that the method's parameters should have.   block: the fastpeft.blocks.Block around it, for `share` of a
    ROUTED method; None elsewhere.
    """

    name: str
    base: Any
    dtype: torch.dtype
    block: Any = None

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def device(self) -> torch.device:
        return self.base.device

    def empty(self, *shape: int) -> nn.Parameter:
        """An uninitialised trainable parameter of the site's dtype and device."""
        return nn.Parameter(torch.empty(*shape, dtype=self.dtype, device=self.device))

    def zeros(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(*shape, dtype=self.dtype, device=self.device))


@dataclass(frozen=True)
class PeftFormat:
    """How PEFT stores a method: its peft_type, the file key of each parameter, and the config fields of given options.

    config: None where PEFT cannot express the options; the folder is then fastpeft's own. Its argument may hold rank_pattern and
        alpha_pattern beside the options, and its result too, where PEFT's differ.
    config_class: its name in peft.   start: the field that says how PEFT initialises.
    reads: config field -> option; empty where another method of the same peft_type is what its configs are read as.
    lacks: what LoraConfig holds and this class does not (bias, fan_in_fan_out, rank_pattern, alpha_pattern).
    silent: config fields that this class holds and that do not change what the layer computes.
    unpack(config, tensors of the file) -> tensors as `keys` names them, where PEFT writes others; ValueError if they disagree.
    pack(config, tensors) -> both as they are to be written.
    gates: the file key of what PEFT does not know, which goes into the folder's file of gates; "" where there is none.
    """

    peft_type: str
    keys: Mapping[str, str]
    config: Callable[[Mapping[str, Any]], dict[str, Any] | None]
    config_class: str = "LoraConfig"
    reads: Mapping[str, str] = field(default_factory=dict)
    start: str = "init_lora_weights"
    lacks: frozenset[str] = frozenset()
    silent: frozenset[str] = frozenset()
    unpack: Callable[[Mapping[str, Any], Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    pack: Callable[[dict[str, Any], dict[str, torch.Tensor]], tuple[dict[str, Any], dict[str, torch.Tensor]]] | None = None
    gates: str = ""


@dataclass(frozen=True)
class Notes:
    """What a method's page (docs/methods) says of it beyond what its code says.

    formula: what the layer computes, in the names of its parameters.   defaults: where the options' defaults come from.
    oracle: what its tests hold it against.   deviations: where it differs from its paper or the authors' code, and why.
    """

    formula: str
    defaults: str
    oracle: str
    deviations: tuple[str, ...] = ()


class Holder(nn.Module):
    """Parameters that several sites share; ROLES as a Method's.

    per_forward: whether open() stands before each forward of the adapted root and close() after it, also after an error.
    in_layers: whether the layers read them, so that each has several gradients to be added up.
    enabled: false while the adapters are off.
    """

    ROLES: ClassVar[Mapping[str, str]] = {}
    per_forward: bool = False
    in_layers: bool = True
    enabled: bool = True
    _reduced: bool = False

    def used(self) -> None:
        """A layer reads these parameters: its terms() says so first.

        RuntimeError in the recompute of a reentrant checkpoint under DistributedDataParallel, which would take the part of the
        gradient that comes first for the whole, and in some models silently. (With static_graph=True it waits for the rest.)
        """
        if torch.compiler.is_compiling():
            return
        if torch._C._current_graph_task_id() == -1:
            ddp = nn.parallel.DistributedDataParallel._active_ddp_module
            self._reduced = ddp is not None and not ddp.static_graph
        elif self._reduced and torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
            # (the other kind of checkpoint recomputes under hooks of its own)
            raise RuntimeError(
                "several layers share parameters, whose gradients DistributedDataParallel cannot collect from reentrant "
                "checkpoints; use use_reentrant=False, or DistributedDataParallel(..., static_graph=True)."
            )

    def open(self) -> None:
        """A forward of the adapted root begins."""

    def close(self) -> None:
        """It is over."""


class Method(nn.Module):
    """What every method is: parameters, their ROLES, and terms(base). Options are __init__'s keyword-only arguments.

    ROLES says what each parameter is ("down", "up", "gain", "bias", "gate", ...); optimiser groups, weight-decay rules and
    reports read it. NOTES go into its page. PEFT is None where PEFT has no such method.
    SITE says what it sits on: "linear", or "ffn": beside a whole feed-forward block, whose output becomes
    FFN(x) + sum of terms(x) + residual() * x. Only Kron and Bias terms are known there.
    PROCEDURE names the class in fastpeft.train without which the method does not train as its paper says; attached: whether it is
    (need_procedure raises where it is not).
    TRAINS_ALL: every parameter of the model goes on training, adapted or not.   writes_base: the procedure writes the layer's weight.
    SHARES: parameters that several sites use live in holders, which `share` makes; __init__ takes (site, holder or None).
    BEGIN: options that only say where its values begin; a checkpoint of another beginning loads.
    EXPERTS: it takes trained LoRAs (adapt's experts=...). Its option `experts` is a number of fresh ones or the site's
        fastpeft.stack.Experts, whose values `take` gets; its attribute `experts` is an Experts, `stack` and `gate_of` give values back.
    ROUTED: a router per transformer block, which `share` makes (fastpeft.routing.Router); a layer must lie in a block.
    overlay: the fastpeft.overlay.Overlay of a method that keeps W changed between forwards.
    """

    ROLES: ClassVar[Mapping[str, str]] = {}
    NOTES: ClassVar[Notes | None] = None
    PEFT: ClassVar[PeftFormat | None] = None
    SITE: ClassVar[str] = "linear"
    PROCEDURE: ClassVar[str] = ""
    SHARES: ClassVar[bool] = False
    BEGIN: ClassVar[frozenset[str]] = frozenset()
    EXPERTS: ClassVar[bool] = False
    ROUTED: ClassVar[bool] = False
    TRAINS_ALL: ClassVar[bool] = False
    writes_base: bool = False
    attached: bool = False
    overlay: Any = None

    def terms(self, base: Any) -> list[Term]:
        """The terms of one forward; composed from parameters with ordinary PyTorch, so no gradient is written here."""
        raise NotImplementedError

    def static_terms(self, base: Any) -> list[Term]:
        """The same sum as merge and export want it: at its true ranks, where terms() masks some to keep its shapes fixed."""
        return self.terms(base)

    def every_term(self, base: Any) -> list[Term]:
        """The terms with all parts of the method in use, where terms() leaves out some until they exist."""
        return self.terms(base)

    def start(self, site: Site, weight: Callable[[], torch.Tensor], blank: bool) -> nn.Module | None:
        """Begin from the layer's weight; weight() is a copy [out, in], fp32 or wider, made when called.

        A module that is returned replaces the base: its `view()` is what ops see, its tensors are saved as `adapter.base.*`.
        blank: a checkpoint's values follow, so only shapes matter. Called once, after every method of the site is built.
        site: as __init__ had it; keep no reference to it, for that would keep the weight.
        """
        return None

    @classmethod
    def share(
        cls, sites: Sequence[tuple[Site, Mapping[str, Any]]], blank: bool
    ) -> Mapping[str, tuple[Holder, Sequence[str]]]:
        """Key -> (holder, names of its sites) for these sites and their options; a site in none shares nothing. For SHARES only.

        Holders become `adapter_shared.<recipe>_<key>` of the adapted root; a site keeps its own outside the module tree.
        blank: a checkpoint's values follow, so only shapes matter.
        """
        raise NotImplementedError

    def saved(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of this method, by leaf name: live tensors, or ones composed of them."""
        return self.state_dict(keep_vars=True)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `saved` gave; in place, no autograd. Shapes and dtypes have been checked."""
        for leaf, tensor in self.saved().items():
            tensor.copy_(tensors[leaf])
        self.restored()

    @classmethod
    def learning_rate(cls, options: Mapping[str, Any]) -> float | None:
        """The published rule for the learning rate of its parameters, from all of its options; None where there is none."""
        return None

    def need_procedure(self, who: str) -> None:
        """Raise RuntimeError in training while the procedure is not attached; for a method that cannot work without it."""
        if self.training and not self.attached:
            raise RuntimeError(f"{who}: training needs its procedure; attach fastpeft.train.{self.PROCEDURE} (fastpeft.train.attach).")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"attached": False}  # no procedure watches a copy

    def take(self, A: torch.Tensor, B: torch.Tensor, gates: Sequence[torch.Tensor | None]) -> None:
        """Values of trained experts at this site: A [R, in] and B [out, R] of the stack, in the site's dtype.

        gates: of every expert of the model, the vector [in] that its folder has for this site, or None. ValueError where
        something is missing; the model is then as it was.
        """
        raise NotImplementedError

    def stack(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [R, in], B [out, R]) of all experts, for EXPERTS only."""
        return self.A, self.B  # type: ignore[return-value]

    def gate_of(self, z: int) -> torch.Tensor | None:
        """The gate [in] of expert number z at this site, which stands beside its folder; None where the method has none."""
        return None

    def residual(self) -> torch.Tensor | None:
        """On an ffn site: the factor [1] with which x itself is added; None adds none."""
        return None

    def release(self, weight: torch.Tensor) -> None:
        """Put the base weight [out, in] back as it was, where an overlay changed it at the entries of `index`."""
        if self.overlay is not None:
            self.overlay.release(weight, self.index)

    def refill(self) -> None:
        """Write the buffers that are not saved (masks, indices) in place."""

    def check_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raise ValueError where a saved state of this method is wrong in what shapes and dtypes do not show."""

    def restored(self) -> None:
        """Saved tensors were written into this method's own."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.restored()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Method:
        super()._apply(fn, recurse)
        self.refill()  # a move may leave buffers undefined: to_empty() after a start on the meta device does
        return self


@dataclass(frozen=True)
class Recipe:
    name: str
    cls: type[Method]
    paper: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    own_notes: Notes | None = None

    @property
    def notes(self) -> Notes | None:
        return self.own_notes or self.cls.NOTES

    @property
    def site(self) -> str:
        return self.cls.SITE

    @property
    def options(self) -> dict[str, Any]:
        """Option name -> default value."""
        parameters = inspect.signature(self.cls.__init__).parameters.values()
        own = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        return own | dict(self.defaults)

    def build(self, site: Site, options: Mapping[str, Any], holder: Holder | None = None) -> Method:
        """The method at one site; raises ValueError naming the site where options do not fit the layer.

        holder: of a method that shares, for this site; None where `share` left the site out.
        """
        own = dict(self.defaults) | dict(options)
        if not self.cls.SHARES:
            return self.cls(site, **own)
        built = self.cls(site, holder, **own)
        built.__dict__["holder"] = holder
        return built


_RECIPES: dict[str, Recipe] = {}
_discovered = False

_NOT_OURS = {
    "olora": "PEFT's 'olora' is a QR initialisation of LoRA (arXiv 2406.01775) and is not offered here; "
    "'o_lora' is orthogonal continual learning (arXiv 2310.14152). Use PEFT's init_lora_weights='olora' for the former.",
}


def method(name: str, *, paper: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: register a Method class and its recipe under `name`."""

    def add(cls: type[Method]) -> type[Method]:
        recipe(name, cls, paper=paper)
        return cls

    return add


def recipe(name: str, cls: type[Method], *, paper: str, notes: Notes | None = None, **defaults: Any) -> None:
    """Register a recipe: `cls` with other defaults, and other notes if given. Raises ValueError if the name is taken."""
    if name in _RECIPES:
        raise ValueError(f"recipe {name!r} is already registered by {_RECIPES[name].cls.__module__}; choose another name.")
    _RECIPES[name] = Recipe(name, cls, paper, defaults, notes)


def discover() -> None:
    """Import every file of fastpeft/method once; a new file needs no other edit."""
    global _discovered
    if _discovered:
        return
    for package in ("fastpeft.method",):
        folder = importlib.import_module(package)
        for info in pkgutil.iter_modules(folder.__path__):
            importlib.import_module(f"{package}.{info.name}")
    _discovered = True


def get_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError listing what exists."""
    discover()
    if name in _RECIPES:
        return _RECIPES[name]
    if name in _NOT_OURS:
        raise ValueError(f"adapt: {_NOT_OURS[name]}")
    raise ValueError(f"adapt: method {name!r} does not exist; choose one of {', '.join(sorted(_RECIPES))}.")


def every_recipe() -> list[Recipe]:
    """All recipes, by name."""
    discover()
    return [_RECIPES[name] for name in sorted(_RECIPES)]


def peft_reader(peft_type: Any) -> Recipe:
    """The recipe that a config of this peft_type is read as. Raises ValueError listing what exists."""
    discover()
    readers = [r for r in _RECIPES.values() if r.cls.PEFT and r.cls.PEFT.reads and not r.defaults]
    found = {r.cls.PEFT.peft_type: r for r in reversed(readers)}  # the first of each type
    if peft_type not in found:
        kinds = {t: sorted(n for n, r in _RECIPES.items() if r.cls.PEFT and r.cls.PEFT.peft_type == t) for t in sorted(found)}
        listing = "; ".join(f"{t} ({', '.join(names)})" for t, names in kinds.items())
        raise ValueError(f"peft config: peft_type {peft_type!r} is not supported; supported are {listing}.")
    return found[peft_type]


def check_options(names: list[str], options: Mapping[str, Any]) -> None:
    """Raise ValueError if an option belongs to none of the named recipes (the message lists what exists), or a flag is no bool."""
    known = {name: get_recipe(name).options for name in names}
    for option in options:
        if not any(option in own for own in known.values()):
            listing = "; ".join(f"{name}: {', '.join(own)}" for name, own in known.items())
            raise ValueError(f"adapt: option {option!r} does not exist for {', '.join(names)}; options are: {listing}.")
        flag = any(isinstance(own.get(option), bool) for own in known.values())
        if flag and not isinstance(options[option], bool):  # the text "false" would count as true
            raise ValueError(f"adapt: {option}={options[option]!r}; it must be True or False.")
