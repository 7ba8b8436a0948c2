"""Laplace-LoRA in use: what fit leaves as it was, batches of every kind, language models and padding, files, and what is refused."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from checks import DT, perturb
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft import laplace
from fastpeft.adapter import base_of

CLASSES = 3


class Pool(nn.Module):
    """Tokens through two layers, their mean over what is no padding, and a head; a batch is (tokens, mask, labels)."""

    def __init__(self, *sizes):
        super().__init__()
        self.a, self.b = (nn.Linear(n, m, dtype=DT) for n, m in pairwise(sizes[:3]))
        self.head = nn.Linear(*sizes[2:], dtype=DT)

    def forward(self, batch):
        x, mask, *_ = batch
        return self.pooled(torch.tanh(self.b(torch.tanh(self.a(x)))), mask)

    def pooled(self, h, mask):
        mask = mask.to(h.dtype)
        return self.head((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def built(method="laplace", **options):
    model = Pool(6, 7, 5, CLASSES)
    fastpeft.adapt(model, method, **(dict(rank=3, alpha=5, target_modules=["a", "b"]) | options))
    return perturb(model)


def batches(samples=10, tokens=2, padded=False, seed=3):
    """Two batches of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, tokens, 6, dtype=DT, generator=generator)
    mask = torch.ones(samples, tokens, dtype=DT)
    if padded:
        mask[torch.arange(samples) % 3 == 0, 1:] = 0
    y = torch.randint(CLASSES, (samples,), generator=generator)
    return [(x[part], mask[part], y[part]) for part in (slice(None, samples // 3), slice(samples // 3, None)) if len(y[part])]


READ = dict(logits=lambda model, batch: model(batch), labels=lambda batch: batch[2], mask=lambda batch: batch[1])


def fitted(model, data, **options):
    return laplace.fit(model, data, **(READ | options))


def same(one, other):
    """Two posteriors, to the bit."""
    assert list(one.factors) == list(other.factors)
    assert torch.equal(one.precision, other.precision) and one.log_likelihood == other.log_likelihood
    for name, f in one.factors.items():
        g = other.factors[name]
        pairs = [(f.mode, g.mode), (f.G.values, g.G.values), (f.G.vectors, g.G.vectors), (f.U.values, g.U.values), (f.U.vectors, g.U.vectors)]
        assert all(torch.equal(a, b) for a, b in pairs), name


def close(one, other):
    """Two posteriors up to rounding."""
    assert list(one.factors) == list(other.factors)
    for name, f in one.factors.items():
        for side in ("G", "U"):
            assert_fp64(getattr(f, side).matrix(), getattr(other.factors[name], side).matrix(), f"{side} of {name}")


def test_the_model_is_left_as_it_was():
    model, data = built(dropout=0.4), batches()
    model.a.eval()
    model.a.adapter.laplace.A.grad = mark = torch.ones_like(model.a.adapter.laplace.A)
    modes, before = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    generator = torch.get_rng_state()
    posterior = fitted(model, data)
    posterior.logits(data[0])
    assert [m.training for m in model.modules()] == modes and True in modes and False in modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == 1 and grads[0] is mark and torch.equal(mark, torch.ones_like(mark))
    assert torch.equal(torch.get_rng_state(), generator), "dropout was drawn"
    assert not any(m._forward_hooks for m in model.modules())
    same(posterior, fitted(model.eval(), data))


def test_hooks_go_and_modes_return_after_an_error():
    model, data = built(), batches()
    with pytest.raises(ZeroDivisionError):
        fitted(model, data, logits=lambda model, batch: model(batch) / (1 // 0))
    assert not any(m._forward_hooks for m in model.modules()) and all(m.training for m in model.modules())


def test_the_split_into_batches_does_not_matter():
    model, data = built(), batches(padded=True, tokens=4)
    joined = [tuple(torch.cat(parts) for parts in zip(*data, strict=True))]
    close(fitted(model, data), fitted(model, joined))


@pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients(how):
    model, data = built(), batches()
    want = fitted(model, data)
    with how():
        got = fitted(model, data)
        p = got.predict(data[0], "probit")
        got.tune()
    want.tune()
    close(got, want)
    assert torch.equal(got.precision, want.precision)
    assert not p.requires_grad


class InPlace(Pool):
    """The activations overwrite the layers' outputs."""

    def forward(self, batch):
        x, mask, *_ = batch
        return self.pooled(torch.relu_(self.b(torch.relu_(self.a(x)))), mask)


class OutOfPlace(Pool):
    def forward(self, batch):
        x, mask, *_ = batch
        return self.pooled(torch.relu(self.b(torch.relu(self.a(x)))), mask)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_activations_in_place(frozen, dtype):
    """The gradient is that of the layer's output, not of what was made of it; also where no parameter asks for gradients."""
    data = [(x.to(dtype), m.to(dtype), y) for x, m, y in batches()]
    plain, other = (built_as(cls).to(dtype) for cls in (OutOfPlace, InPlace))
    other.load_state_dict(plain.state_dict())
    want, got = fitted(plain, data), fitted(other, data)
    if frozen:
        plain.requires_grad_(False)
        other.requires_grad_(False)
        for a, b in zip(want.logits(data[0]), got.logits(data[0]), strict=True):
            assert torch.equal(a, b) and a.abs().max() > 0.01
    same(got, want)


def built_as(cls):
    model = cls(6, 7, 5, CLASSES)
    fastpeft.adapt(model, "laplace", rank=3, target_modules=["a", "b"])
    return perturb(model)


def test_a_frozen_model_predicts_the_same():
    model, data = built(), batches()
    posterior = fitted(model, data)
    want = posterior.logits(data[1])
    model.requires_grad_(False)
    for got, w in zip(posterior.logits(data[1]), want, strict=True):
        assert_fp64(got, w)


def test_other_values_are_refused_until_they_are_back():
    model, data = built(), batches()
    posterior = fitted(model, data)
    want = posterior.predict(data[0], "probit")
    kept = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-7, fused=True)
    model(data[0]).sum().backward()
    optimizer.step()
    for kind in ("probit", "map"):
        with pytest.raises(RuntimeError, match=r"A of 'a' is not what it was"):
            posterior.predict(data[0], kind)
    model.load_state_dict(kept)
    assert torch.equal(posterior.predict(data[0], "probit"), want)


# which factors


def test_last_layer_and_named_layers():
    model, data = built(), batches()
    every = fitted(model, data)
    for sites, want in (("last", ["b.A", "b.B"]), (["a"], ["a.A", "a.B"]), ("[ab]", list(every.factors))):
        got = fitted(model, data, sites=sites)
        assert list(got.factors) == want
        for name in want:
            assert_fp64(got.factors[name].G.matrix(), every.factors[name].G.matrix(), name)
    _, S = every.logits(data[0])
    shares = [fitted(model, data, sites=s).logits(data[0])[1] for s in (["a"], "last")]
    assert_fp64(S, sum(shares), "the covariance is the sum over factors")


def test_only_what_trains_is_random():
    """lora_fa's A is constant; a head that trains is none of the posterior's."""
    model, data = built("lora_fa", modules_to_save=["head"]), batches()
    posterior = fitted(model, data)
    assert list(posterior.factors) == ["a.B", "b.B"] and posterior.predict(data[0], "probit").shape == (3, CLASSES)
    model, options = Pool(6, 7, 5, CLASSES), dict(rank=3, alpha=5, target_modules=["a", "b"])
    fastpeft.adapt(model, "lora", lora_bias=True, bias="all", **options)
    assert list(fitted(perturb(model), data).factors) == ["a.A", "a.B", "b.A", "b.B"]


def test_same_layer_as_lora():
    ours, lora = built(), built("lora")
    keys = {k: k.replace(".laplace.", ".lora.") for k in ours.state_dict()}
    lora.load_state_dict({keys[k]: v for k, v in ours.state_dict().items()})
    data = batches()
    same(fitted(ours, data), fitted(lora, data))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base(kind):
    """The posterior is that of the weights which the base stands for."""
    torch.manual_seed(5)
    plain = Pool(8, 32, 16, CLASSES)
    model, options = copy.deepcopy(plain), dict(rank=3, alpha=5, target_modules=["a", "b"])
    fastpeft.adapt(model, "laplace", quantize=kind, **options)
    with torch.no_grad():
        for site in (plain.a, plain.b):
            dense = base_of(model.a if site is plain.a else model.b).dense(DT)
            assert (dense - site.weight).abs().max() > 1e-4
            site.weight.copy_(dense)
    fastpeft.adapt(plain, "laplace", **options)
    perturb(model)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k.endswith((".laplace.A", ".laplace.B"))}, strict=False)
    data = [(torch.randn(9, 2, 8, dtype=DT), torch.ones(9, 2), torch.randint(CLASSES, (9,)))]
    close(fitted(model, data), fitted(plain, data))


def test_a_layer_used_twice():
    """Its uses count like tokens, and both are in its Jacobian."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(6, 6, dtype=DT), nn.Linear(6, CLASSES, dtype=DT)

        def forward(self, batch):
            return self.head(torch.tanh(self.a(torch.tanh(self.a(batch[0][:, 0])))))

    model, data = Twice(), batches()
    fastpeft.adapt(model, "laplace", rank=2, target_modules=["a"])
    posterior = fitted(perturb(model), data, mask=lambda batch: None)
    own = model.a.adapter.laplace
    x = torch.cat([x[:, 0] for x, _, _ in data])
    with torch.no_grad():
        both = torch.cat([x, torch.tanh(model.a(x))])
    assert_fp64(posterior.factors["a.A"].U.matrix(), both.T @ both / len(both))
    _, S = posterior.logits(data[0])
    J = {p: torch.stack([torch.autograd.grad(model(data[0])[0, k], p)[0].flatten() for k in range(CLASSES)]) for p in (own.A, own.B)}
    want = sum(J[p] @ torch.linalg.solve(posterior.matrix(n), J[p].T) for p, n in ((own.A, "a.A"), (own.B, "a.B")))
    assert_fp64(S[0], want)


# batches


def test_default_batches():
    class Dict(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, attention_mask):
            return type("Output", (), {"logits": self.inner((x, attention_mask))})

    inner = built()
    data = batches(padded=True)
    want = fitted(inner, data)
    model = Dict(Pool(6, 7, 5, CLASSES))
    fastpeft.adapt(model, "laplace", rank=3, alpha=5, target_modules=["a", "b"])
    model.inner.load_state_dict(inner.state_dict())
    got = laplace.fit(model, [{"x": x, "attention_mask": m, "labels": y} for x, m, y in data])
    assert list(got.factors) == ["inner." + n for n in want.factors]
    for name, f in want.factors.items():
        assert torch.equal(got.factors["inner." + name].G.values, f.G.values)

    model = nn.Sequential(nn.Linear(6, 4, dtype=DT), nn.Tanh(), nn.Linear(4, CLASSES, dtype=DT))
    fastpeft.adapt(model, "laplace", rank=2)
    posterior = laplace.fit(perturb(model), [(x[:, 0], y) for x, _, y in data])
    p, y = posterior.evaluate([(x[:, 0], y) for x, _, y in data], "probit")
    assert torch.equal(y, torch.cat([y for _, _, y in data])) and p.shape == (len(y), CLASSES)


def test_the_model_may_be_the_layer():
    layer = nn.Linear(6, CLASSES, dtype=DT)
    fastpeft.adapt(layer, "laplace", rank=2)
    posterior = laplace.fit(perturb(layer), [(x[:, 0], y) for x, _, y in batches()])
    assert list(posterior.factors) == ["A", "B"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_language_models_and_padding(llama, side):
    """One padded batch is the samples one by one, in the factors, the evidence and the predictive; an answer stands last."""
    llama = llama.double()
    fastpeft.adapt(llama, "laplace", rank=2, target_modules=["q_proj", "v_proj", "lm_head"])
    perturb(llama)
    ids, labels = torch.randint(2, 64, (4, 6)), torch.tensor([0, 2, 1, 1])
    lengths = torch.tensor([6, 3, 5, 1])
    steps = torch.arange(6)
    mask = (steps < lengths[:, None] if side == "right" else steps >= 6 - lengths[:, None]).long()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    together = [{"input_ids": ids, "attention_mask": mask, "position_ids": places, "labels": labels}]
    alone = [{"input_ids": i[m == 1][None], "labels": y[None]} for i, m, y in zip(ids, mask, labels, strict=True)]
    read = dict(logits=laplace.answers([5, 9, 11]))
    one, other = laplace.fit(llama, together, **read), laplace.fit(llama, alone, **read)
    assert len(one.factors) == 10 and one.settings["samples"] == 4
    close(one, other)
    assert_fp64(one.log_evidence(), other.log_evidence())
    f, S = one.logits(together[0])
    for n, batch in enumerate(alone):
        single, its = other.logits(batch)
        assert_fp64(f[n], single[0])
        assert_fp64(S[n], its[0])
        assert_fp64(f[n], llama(batch["input_ids"]).logits[0, -1, [5, 9, 11]])
    last = laplace.fit(llama, together, sites="last", **read)
    assert list(last.factors) == ["lm_head.A", "lm_head.B"]


def test_a_transformers_classifier_with_its_own_batches():
    """Nothing is told but model and batches; the pooler reads one vector of each sample; the new head is not random."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                                     max_position_embeddings=16, num_labels=CLASSES)  # fmt: skip
    model = transformers.BertForSequenceClassification(config).double()
    fastpeft.adapt(model, "laplace", rank=2, modules_to_save=["classifier"])
    perturb(model)
    ids, y = torch.randint(2, 40, (3, 5)), torch.tensor([0, 2, 1])
    mask = (torch.arange(5) < torch.tensor([5, 2, 4])[:, None]).long()
    together = [transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask, "labels": y})]
    alone = [{"input_ids": i[m == 1][None], "labels": k[None]} for i, m, k in zip(ids, mask, y, strict=True)]
    one, other = laplace.fit(model, together), laplace.fit(model, alone)
    assert len(one.factors) == 2 * (2 * 6 + 1) and "bert.pooler.dense.B" in one.factors
    close(one, other)
    assert_fp64(one.predict(together[0], "probit"), other.evaluate(alone, "probit")[0])


# files


def test_save_and_load_beside_the_adapter(tmp_path):
    model, data = built(), batches(padded=True)
    plain = Pool(6, 7, 5, CLASSES)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "adapter" not in k})
    posterior = fitted(model, data, n_kfac=2, large=4)
    posterior.tune(per_factor=True)
    fastpeft.save_adapter(model, tmp_path)
    posterior.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "laplace.safetensors"]
    fastpeft.load_adapter(plain, tmp_path)
    plain.requires_grad_(False)
    loaded = laplace.load(plain, tmp_path, **READ)
    same(loaded, posterior)
    assert loaded.settings == posterior.settings
    assert torch.equal(loaded.log_evidence(), posterior.log_evidence())
    for kind in ("map", "probit"):
        assert_fp64(loaded.predict(data[0], kind), posterior.predict(data[0], kind))


def test_a_folder_with_a_posterior_loads_in_stock_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model, data = built(), batches()
    plain = Pool(6, 7, 5, CLASSES)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "adapter" not in k})
    fastpeft.save_adapter(model, tmp_path)
    posterior = fitted(model, data)
    posterior.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path), autocast_adapter_dtype=False).eval()
    assert_fp64(theirs(data[0]).softmax(1), posterior.predict(data[0], "map"))


@pytest.mark.parametrize("sites", ["last", ["a"]])
def test_a_posterior_of_some_layers_is_loaded_as_such(tmp_path, sites):
    model, data = built(), batches()
    posterior = fitted(model, data, sites=sites)
    posterior.save(tmp_path)
    same(laplace.load(model, tmp_path, **READ), posterior)


def test_files_that_do_not_belong(tmp_path):
    model, data = built(), batches()
    with pytest.raises(FileNotFoundError, match=r"laplace\.safetensors does not exist"):
        laplace.load(model, tmp_path)
    fitted(model, data).save(tmp_path)
    other = built(rank=2)
    with pytest.raises(fastpeft.CheckpointError, match=r"a\.A has other values"):
        laplace.load(other, tmp_path)
    with pytest.raises(fastpeft.CheckpointError, match=r"of these the model has \['a.A', 'a.B'\]"):
        laplace.load(built(target_modules=["a"]), tmp_path)
    with torch.no_grad():
        model.b.adapter.laplace.B[0, 0] += 1e-9
    with pytest.raises(fastpeft.CheckpointError, match=r"b\.B has other values"):
        laplace.load(model, tmp_path)
    file = tmp_path / "laplace.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(fastpeft.CheckpointError, match="truncated or damaged"):
        laplace.load(model, tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model, data = built(), batches()
    posterior = fitted(model, data)
    posterior.save(tmp_path)
    old = (tmp_path / "laplace.safetensors").read_bytes()
    posterior.tune()

    def broken(path, content):
        path.write_bytes(content[:10])
        raise OSError("no space left")

    monkeypatch.setattr("fastpeft.folder.sync_write", broken)
    with pytest.raises(OSError, match="no space left"):
        posterior.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["laplace.safetensors"] and (tmp_path / "laplace.safetensors").read_bytes() == old


# what is refused


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(token_scale="words"), "token_scale='words'; it must be one of tokens, samples"),
        (dict(n_kfac=0), "n_kfac=0"),
        (dict(large=-1), "large=-1"),
        (dict(precision=0.0), "positive number"),
        (dict(sites=["c"]), "leaves no layer whose factors train; adapted are a, b"),
        (dict(logits=lambda model, batch: model(batch)[:, None]), r"needed are \[samples, classes\].*laplace.answers"),
        (dict(logits=lambda model, batch: model(batch)[:, :1]), "two classes or more"),
        (dict(logits=lambda model, batch: model.head(batch[0][:, 0, :5])), "no adapted layer ran"),
        (dict(labels=lambda batch: batch[2] + 1), "from 0 to 2"),
        (dict(labels=lambda batch: batch[2][:, None]), "the labels are"),
        (dict(mask=lambda batch: batch[1][:, :1]), r"the mask is \(3, 1\), and 'a' reads \(3, 2\)"),
    ],
)
def test_bad_requests(options, text):
    with pytest.raises(ValueError, match=text):
        fitted(built(), batches(), **options)


def test_other_bad_requests():
    data = batches()
    with pytest.raises(ValueError, match="the loader gave no sample"):
        fitted(built(), [])
    with pytest.raises(ValueError, match="was not adapted"):
        fitted(Pool(6, 7, 5, CLASSES), data)
    for method in ("dora", "loha", "adalora"):
        with pytest.raises(ValueError, match=f"'a' carries {method}, which is not one LoRA's A and B"):
            fitted(built(method), data)
    posterior = fitted(built(), data)
    with pytest.raises(ValueError, match="kind='nn'; it must be one of mc, probit, map"):
        posterior.predict(data[0], "nn")
    with pytest.raises(ValueError, match="tune_on: the loader gave no sample"):
        posterior.tune_on([])
    with pytest.raises(ValueError, match="two or more different tokens"):
        laplace.answers([3, 3])


def test_inputs_that_hide_the_samples_are_refused():
    class Flat(Pool):
        def forward(self, batch):
            x, mask, y = batch
            return super().forward((x.flatten(0, 1)[:, None], mask.flatten()[:, None], y)).view(*x.shape[:2], -1).mean(1)

    model = Flat(6, 7, 5, CLASSES)
    fastpeft.adapt(model, "laplace", rank=2, target_modules=["a", "b"])
    with pytest.raises(ValueError, match="must begin with the samples"):
        fitted(perturb(model), batches(), mask=lambda batch: None)


def test_a_layer_that_never_runs_is_refused():
    model, data = built(), batches()

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.spare = Pool(6, 7, 5, CLASSES), nn.Linear(6, 6, dtype=DT)

        def forward(self, batch):
            return self.inner(batch)

    model = Half()
    fastpeft.adapt(model, "laplace", rank=2, target_modules=["a", "b", "spare"])
    with pytest.raises(ValueError, match="'spare' never ran"):
        fitted(perturb(model), data)
    assert len(fitted(model, data, sites=["a", "b"]).factors) == 4
