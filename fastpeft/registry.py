"""Methods and recipes: how a file in fastpeft/method/ becomes a name that users can type.

A *method* owns parameters and returns terms. A *recipe* is what a paper prescribes: method, start (initialisation),
procedures (what happens around an optimiser step) and defaults. `@method` registers a class together with its own recipe;
`recipe` adds further ones. Files in fastpeft/method and fastpeft/start are found by listing the folder on first use.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from fastpeft.base import Plain
from fastpeft.terms import Bias, Kron, LowRank, Term, is_linear


@dataclass(frozen=True)
class Site:
    """Where a method is built: the layer's name and its base (shapes, norms, products; not the raw weight).

    dtype is the dtype that the method's parameters should have.
    """

    name: str
    base: Any
    dtype: torch.dtype

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

    config: None where PEFT cannot express the options; the folder is then fastpeft's own.
    config_class: its name in peft.   start: the field that says how PEFT initialises.
    reads: config field -> option; empty where another method of the same peft_type is what its configs are read as.
    lacks: what LoraConfig holds and this class does not (bias, fan_in_fan_out, rank_pattern, alpha_pattern).
    silent: config fields that this class holds and that do not change what the layer computes.
    unpack(config, tensors of the file) -> tensors as `keys` names them, where PEFT writes others; ValueError if they disagree.
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


@dataclass(frozen=True)
class Notes:
    """What METHODS.md says of a method beyond what its code says.

    formula: what the layer computes, in the names of its parameters.   defaults: where the options' defaults come from.
    oracle: what its tests hold it against.   deviations: where it differs from its paper or the authors' code, and why.
    """

    formula: str
    defaults: str
    oracle: str
    deviations: tuple[str, ...] = ()


class Method(nn.Module):
    """What every method is: parameters, their ROLES, and terms(base). Options are __init__'s keyword-only arguments.

    ROLES says what each parameter is ("down", "up", "gain", "bias", "gate", ...); optimiser groups, weight-decay rules and
    reports read it. NOTES is its entry in METHODS.md. PEFT is None where PEFT has no such method.
    SITE says what it sits on: "linear", or "ffn": beside a whole feed-forward block, whose output becomes
    FFN(x) + sum of terms(x) + residual() * x. Only Kron and Bias terms are known there.
    PROCEDURE names the class in fastpeft.train without which the method does not train as its paper says.
    SHARES: parameters that several sites use live in holders, which `share` makes; __init__ takes (site, holder).
    overlay: the fastpeft.overlay.Overlay of a method that keeps W changed between forwards.
    """

    ROLES: ClassVar[Mapping[str, str]] = {}
    NOTES: ClassVar[Notes]
    PEFT: ClassVar[PeftFormat | None] = None
    SITE: ClassVar[str] = "linear"
    PROCEDURE: ClassVar[str] = ""
    SHARES: ClassVar[bool] = False
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

    def start(self, weight: Callable[[], torch.Tensor], blank: bool) -> nn.Module | None:
        """Begin from the layer's weight; weight() is a copy [out, in], fp32 or wider, made when called.

        A module that is returned replaces the base: its `view()` is what ops see, its tensors are saved as `adapter.base.*`.
        blank: a checkpoint's values follow, so only shapes matter. Called once, after every method of the site is built.
        """
        return None

    @classmethod
    def share(cls, sites: Sequence[tuple[Site, Mapping[str, Any]]]) -> Mapping[str, tuple[nn.Module, Sequence[str]]]:
        """Key -> (holder, names of its sites) for these sites and their options; every site in one. For SHARES only.

        Holders become `adapter_shared.<recipe>_<key>` of the adapted root; a site keeps its own outside the module tree.
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

    @property
    def site(self) -> str:
        return self.cls.SITE

    @property
    def options(self) -> dict[str, Any]:
        """Option name -> default value."""
        parameters = inspect.signature(self.cls.__init__).parameters.values()
        own = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        return own | dict(self.defaults)

    def build(self, site: Site, options: Mapping[str, Any], holder: nn.Module | None = None) -> Method:
        """The method at one site; raises ValueError naming the site where options do not fit the layer.

        A method that shares gets `holder`, or one of its own.
        """
        own = dict(self.defaults) | dict(options)
        if not self.cls.SHARES:
            return self.cls(site, **own)
        if holder is None:
            ((holder, _),) = self.cls.share([(site, self.options | own)]).values()
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


def recipe(name: str, cls: type[Method], *, paper: str, **defaults: Any) -> None:
    """Register a recipe: `cls` with other defaults. Raises ValueError if the name is taken."""
    if name in _RECIPES:
        raise ValueError(f"recipe {name!r} is already registered by {_RECIPES[name].cls.__module__}; choose another name.")
    _RECIPES[name] = Recipe(name, cls, paper, defaults)


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


@dataclass(frozen=True)
class MethodInfo:
    """One row of fastpeft.methods()."""

    name: str
    paper: str
    summary: str
    terms: tuple[str, ...]
    options: Mapping[str, Any]
    mergeable: bool
    exportable: bool
    site: str = "linear"


class MethodTable(tuple[MethodInfo, ...]):
    """What fastpeft.methods() returns: a tuple of MethodInfo that prints as a table."""

    def __str__(self) -> str:
        rows = [("method", "paper", "site", "terms", "merge", "to LoRA", "options")]
        for m in self:
            options = ", ".join(f"{k}={v!r}" for k, v in m.options.items())
            rows.append((m.name, m.paper, m.site, " ".join(m.terms), _yes(m.mergeable), _yes(m.exportable), options))
        widths = [max(len(row[k]) for row in rows) for k in range(6)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[6]]) for r in rows)


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def methods() -> MethodTable:
    """Every recipe: name, paper, terms, options with defaults, whether it merges into W, whether it exports to plain LoRA.

    The last three are read off the terms of the method built on a 32 x 32 layer, not declared.
    """
    discover()
    return MethodTable(_describe(_RECIPES[name]) for name in sorted(_RECIPES))


def _describe(r: Recipe) -> MethodInfo:
    base = Plain(torch.eye(32))
    with torch.random.fork_rng(devices=[]):
        terms = r.build(Site("example", base, torch.float32), {}).every_term(base)
    kinds = tuple(dict.fromkeys(type(t).__name__ for t in terms))
    doc = (inspect.getdoc(inspect.getmodule(r.cls)) or inspect.getdoc(r.cls) or "").splitlines()
    linear = is_linear(terms) and r.site == "linear"
    exportable = linear and all(isinstance(t, (LowRank, Kron, Bias)) for t in terms)
    return MethodInfo(r.name, r.paper, doc[0] if doc else "", kinds, r.options, linear, exportable, r.site)


def check_options(names: list[str], options: Mapping[str, Any]) -> None:
    """Raise ValueError if an option belongs to none of the named recipes; the message lists what exists."""
    known = {name: get_recipe(name).options for name in names}
    for option in options:
        if not any(option in own for own in known.values()):
            listing = "; ".join(f"{name}: {', '.join(own)}" for name, own in known.items())
            raise ValueError(f"adapt: option {option!r} does not exist for {', '.join(names)}; options are: {listing}.")


def check_rank(who: str, rank: Any, site: Site) -> None:
    """Raise unless rank is an int between 1 and the smaller side of the layer."""
    limit = min(site.out_features, site.in_features)
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"{who}: rank={rank!r} at {site.name!r}; it must be an int.")
    if not 1 <= rank <= limit:
        raise ValueError(
            f"{who}: rank={rank} at {site.name!r} ({site.in_features} -> {site.out_features}); it must be 1 to {limit}, "
            "the smaller side of the layer. Lower it there with rank_pattern, or exclude the layer."
        )


def check_int(who: str, name: str, value: Any, low: int, high: int | None, where: str, limit: str = "") -> int:
    """Raise TypeError unless value is an int, ValueError unless low <= value <= high; `limit` says what `high` is."""
    span = f"at least {low}" if high is None else f"{low} to {high}{', ' + limit if limit else ''}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{who}: {name}={value!r} at {where!r}; it must be an int, {span}.")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{who}: {name}={value} at {where!r}; it must be {span}.")
    return value


def check_probability(who: str, name: str, p: Any) -> float:
    """Raise unless p is a number in [0, 1); returns it as a float."""
    if not isinstance(p, (int, float)) or isinstance(p, bool) or not 0.0 <= p < 1.0:
        raise ValueError(f"{who}: {name}={p!r}; it must be a number of at least 0 and less than 1.")
    return float(p)


def check_finite(who: str, name: str, value: Any) -> float:
    """Raise unless value is a finite number; returns it as a float."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{who}: {name}={value!r}; it must be a finite number.")
    return float(value)

