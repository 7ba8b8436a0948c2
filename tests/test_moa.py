"""Mixture-of-LoRAs: the expert of a label, routers and their loss, disabling and adding, checkpoints, folders, errors."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from checks import DT, perturb, rand, with_masks
from loops import Case, assert_same, examples, plain, trainer_of
from mixtures import EXPERTS, batch, folders, mixture, single
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft import domains, train
from fastpeft.routing_hooks import routing_of

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

NAMES = list(EXPERTS)


@pytest.fixture
def base(llama):
    return llama.to(DT)


@pytest.fixture
def found(base, tmp_path):
    return folders(base, tmp_path)


def trained(model, procedure, **options):
    """A runner of the procedure over AdamW."""
    procedures = [procedure]
    optimizer = train.build_optimizer(model, procedures, torch.optim.AdamW, **({"lr": 0.05, "weight_decay": 0.0} | options))
    return optimizer, train.attach(model, optimizer, procedures)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# one label, one expert


def test_a_labelled_sequence_computes_its_single_lora(base, found):
    model, (ids, labels) = mixture(base, found), batch()
    domain = torch.tensor([0, 2, 1, 0])
    got = model(ids, labels=labels, domain=domain).logits
    for row, z in enumerate(domain.tolist()):
        assert_fp64(got[row : row + 1], single(base, found[NAMES[z]])(ids[row : row + 1]).logits, NAMES[z])
    assert torch.equal(model(ids, labels=labels, domain=[NAMES[z] for z in domain]).logits, got)
    assert all(torch.equal(c, domain) for c in domains.choices(model).values())


def test_labels_equal_pefts_per_sample_adapters(base, found):
    """Outputs against adapter_names= in stock PEFT over the same folders; dx against each single LoRA."""
    model, (ids, labels) = mixture(base, found).train(), batch()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(found["law"]), adapter_name="law", autocast_adapter_dtype=False)
    for name in NAMES[1:]:
        theirs.load_adapter(str(found[name]), adapter_name=name, autocast_adapter_dtype=False)
    domain = ["news", "law", "code", "law"]
    with torch.no_grad():
        want = theirs.eval()(ids, adapter_names=domain).logits
    x = base.get_input_embeddings()(ids).detach().requires_grad_()
    with_masks(model)
    got = model(inputs_embeds=x, labels=labels, domain=domain).logits
    assert_fp64(got, want, "logits")
    d = torch.randn_like(got)
    (dx,) = torch.autograd.grad(got, x, d)
    wants = []
    for row, name in enumerate(domain):
        leaf = x.detach()[row : row + 1].requires_grad_()
        wants += torch.autograd.grad(single(base, found[name])(inputs_embeds=leaf).logits, leaf, d[row : row + 1])
    assert_fp64(dx, torch.cat(wants), "dx")


def test_factor_gradients_are_the_single_loras(base, found):
    """dA and dB of each expert are those of that LoRA on its own sequences, and zero for an expert without any."""
    model, (ids, labels) = with_masks(mixture(base, found).train()), batch()
    site = "model.layers.1.self_attn.v_proj"
    m = model.get_submodule(site).adapter.moa
    d = torch.randn(*ids.shape, 64, dtype=DT)
    got = torch.autograd.grad(model(ids, labels=labels, domain=[0, 0, 1, 1]).logits, (m.A, m.B), d)
    for z, rows in ((0, slice(0, 2)), (1, slice(2, 4))):
        alone = single(base, found[NAMES[z]])
        own = alone.get_submodule(site).adapter.lora
        dA, dB = torch.autograd.grad(alone(ids[rows]).logits, (own.A, own.B), d[rows])
        at = m.experts.span(z)
        fold = own.scale / m.experts.scale  # B holds it
        assert_fp64(got[0][at], dA, f"dA of {NAMES[z]}")
        assert_fp64(got[1][:, at] * fold, dB, f"dB of {NAMES[z]}")
    at = m.experts.span(2)
    assert not got[0][at].any() and not got[1][:, at].any()


# the routers


def formula(model, base_inputs, mask, pool):
    """R h in fp64 from the inputs of the blocks; mask [batch, tokens]."""
    found = {}
    for name, h in base_inputs.items():
        router = routing_of(model, "test").routers[name]
        if pool == "mean":
            pooled = torch.stack([row[m].mean(0) for row, m in zip(h, mask, strict=True)])
        else:
            pooled = torch.stack([row[m][-1] for row, m in zip(h, mask, strict=True)])
        found[name] = pooled @ router.R.T + (0 if router.b is None else router.b)
    return found


def block_inputs(model, **call):
    seen, handles = {}, []
    for name, block in model.named_modules():
        if name in ("model.layers.0", "model.layers.1"):
            handles.append(block.register_forward_pre_hook(lambda m, a, n=name: seen.update({n: a[0].detach()})))
    with torch.no_grad():
        model(**call)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("prompt", ["labels", "all"])
def test_the_choice_is_the_formulas_argmax(base, found, pool, prompt):
    model = mixture(base, found, pool=pool, prompt=prompt, router_bias=True)
    ids, labels = batch(rows=12)
    attention = torch.ones_like(ids)
    attention[2, 7:] = 0
    call = dict(input_ids=ids, labels=labels, attention_mask=attention)
    inputs = block_inputs(model, **call)
    mask = attention.bool() & ((labels == -100) if prompt == "labels" else True)
    want = {n: logits.argmax(-1) for n, logits in formula(model, inputs, mask, pool).items()}
    got = domains.choices(model)
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
    assert len(torch.cat(list(got.values())).unique()) > 1 and not torch.equal(*got.values()), "the choices show nothing"
    with torch.no_grad():
        routed = model(**call).logits
    for row in range(3):  # what a row computes depends on no other row
        alone = {k: v[row : row + 1] for k, v in call.items()}
        with torch.no_grad():
            assert_fp64(model(**alone).logits, routed[row : row + 1], f"row {row}")


def test_a_prompt_mask_overrides_the_labels(base, found):
    model, (ids, labels) = mixture(base, found), batch()
    own = torch.zeros_like(ids)
    own[:, 4:6] = 1
    inputs = block_inputs(model, input_ids=ids, labels=labels, prompt_mask=own)
    want = formula(model, inputs, own.bool(), "mean")
    assert all(torch.equal(c, want[n].argmax(-1)) for n, c in domains.choices(model).items())


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_padding_changes_neither_choice_nor_output(base, found, pool):
    model, (ids, _) = mixture(base, found, pool=pool), batch(rows=6, length=7)
    padded = torch.cat([torch.full((6, 3), 1), ids, torch.full((6, 2), 1)], 1)
    attention = torch.zeros_like(padded)
    attention[:, 3:10] = 1
    places = (attention.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = model(ids).logits
        plain = domains.choices(model)
        got = model(padded, attention_mask=attention, position_ids=places).logits[:, 3:10]
    assert all(torch.equal(plain[n], c) for n, c in domains.choices(model).items())
    assert_fp64(got, want, "logits")


def test_the_vote_is_the_majority_of_the_blocks(base, found):
    """Over the choices of argmax in a pass of its own; the outputs are those of the winner as a label."""
    model, (ids, labels) = mixture(base, found), batch(rows=48)
    voting = mixture(base, found, choice="vote")
    with torch.no_grad():
        for m in (model, voting):  # the first block reads small embeddings
            routing_of(m, "test").routers["model.layers.0"].R.mul_(100)
        model(ids, labels=labels)
        first, second = domains.choices(model).values()
        routing = routing_of(model, "test")
        p = sum(torch.softmax(routing.routers[n].logits(h), -1) for n, h in routing.last.pooled.items())
        got = voting(ids, labels=labels).logits
        winners = list(domains.choices(voting).values())
        assert torch.equal(*winners)
        agree = first == second
        assert agree.any() and not agree.all()
        assert torch.equal(winners[0][agree], first[agree])
        rows = torch.arange(48)  # one vote each: the more probable one
        assert torch.equal(winners[0], torch.where(p[rows, first] >= p[rows, second], first, second))
        assert bool((winners[0] != first).any()) and bool((winners[0] != second).any())
        assert_fp64(got, model(ids, labels=labels, domain=winners[0]).logits, "logits")


def test_routers_learn_separable_domains(base, tmp_path):
    """Cross-entropy near zero, accuracy one, on the labels and then on unseen sequences without labels; the LoRAs do not move."""
    names = {name: {"rank": 2} for name in ("low", "middle", "high")}
    nn.init.normal_(base.get_input_embeddings().weight)  # 18 tokens in 32 dimensions are linearly separable
    model = copy.deepcopy(base)
    fastpeft.adapt(model, "moa", experts=folders(base, tmp_path / "toy", names), train_experts=False)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    procedure = train.MoARouting(eta=1.0)
    optimizer, runner = trained(model, procedure, lr=0.02)

    def sequences(seed, rows=60):
        generator = torch.Generator().manual_seed(seed)
        domain = torch.arange(rows) % 3
        ids = 2 + domain[:, None] * 6 + torch.randint(0, 6, (rows, 8), generator=generator)
        labels = ids.clone()
        labels[:, :5] = -100
        return ids, labels, domain

    with runner:
        for step in range(80):
            ids, labels, domain = sequences(step)
            model.train()
            model(ids, labels=labels, domain=domain).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
            if step == 0:
                assert procedure.accuracy < 0.9, "they were separated before"
        assert procedure.accuracy == 1.0
    ids, labels, domain = sequences(1000)
    with torch.no_grad():
        model.eval()(ids)
    assert all(torch.equal(c, domain) for c in domains.choices(model).values())
    last = routing_of(model, "test").last
    losses = [nn.functional.cross_entropy(routing_of(model, "test").routers[n].logits(h), domain) for n, h in last.pooled.items()]
    assert max(losses) < 0.1, "chance is log 3"
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("detach", [True, False])
def test_the_loss_is_the_papers_and_where_its_gradient_goes(base, found, detach):
    """L_LM + eta mean_l CE(R h, c), by autograd over the formula; with detach=False it reaches the LoRAs below."""
    model, (ids, labels) = mixture(base, found, detach=detach).train(), batch()
    domain = torch.tensor([0, 1, 2, 1])
    _, runner = trained(model, train.MoARouting(0.3))
    with runner:
        loss = model(ids, labels=labels, domain=domain).loss
        loss.backward()
        got = gradients(model)
        model.zero_grad()
        with runner.quiet():
            seen, handles = {}, []
            for name in ("model.layers.0", "model.layers.1"):
                block = model.get_submodule(name)
                handles.append(block.register_forward_pre_hook(lambda m, a, n=name: seen.update({n: a[0]})))
            out = model(ids, labels=labels, domain=domain)
            [h.remove() for h in handles]
            seen = {n: h.detach() if detach else h for n, h in seen.items()}
            logits = formula(model, seen, labels == -100, "mean").values()
            want = out.loss + 0.3 * torch.stack([nn.functional.cross_entropy(q, domain) for q in logits]).mean()
            own = {n: p for n, p in model.named_parameters() if p.requires_grad}
            exact = dict(zip(own, torch.autograd.grad(want, list(own.values())), strict=True))
    assert_fp64(loss.detach(), want.detach(), "loss")
    assert got.keys() == exact.keys() and any("adapter_shared" in n for n in got)
    for n in exact:
        assert_fp64(got[n], exact[n], n)
    with torch.no_grad():
        alone = model.eval()(ids, labels=labels, domain=domain).loss
    assert abs(float(loss.detach() - alone)) > 1e-3


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_trainer_ends_with_the_bits_of_a_plain_loop(accumulation, tmp_path):
    pytest.importorskip("accelerate")
    case = Case("moa", lambda: [train.MoARouting(0.5)], {"experts": 3})
    data = [row | {"domain": torch.tensor(k % 3)} for k, row in enumerate(examples())]
    parts = case.begin()
    start = copy.deepcopy(parts[0])
    trainer_of(parts, tmp_path, accumulation, data=data).train()
    assert_same(parts[0], plain(case, 20, accumulation, data=data))
    still = [n for n, p in parts[0].named_parameters() if p.requires_grad and torch.equal(p, start.get_parameter(n))]
    assert not still


def test_a_bf16_base_and_autocast_route_in_fp32(base, found):
    """The pooled input, the routers and their logits are fp32; the choice is the formula's from the bf16 hidden states."""
    half = copy.deepcopy(base).to(torch.bfloat16)
    model, ids = copy.deepcopy(half), batch(rows=12)[0]
    fastpeft.adapt(model, "moa", experts=3, rank=2)
    perturb(model, 1.0).eval()
    for autocast in (False, True):
        seen = {}
        block = model.model.layers[1]
        handle = block.register_forward_pre_hook(lambda m, a, seen=seen: seen.update(h=a[0].detach()))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(ids)
        handle.remove()
        router, pooled = routing_of(model, "test").routers["model.layers.1"], routing_of(model, "test").last.pooled["model.layers.1"]
        assert seen["h"].dtype is torch.bfloat16 and pooled.dtype is router.R.dtype is router.logits(pooled).dtype is torch.float32
        want = seen["h"].double().mean(1) @ router.R.double().T
        assert torch.equal(domains.choices(model)["model.layers.1"], want.argmax(-1)) and len(want.argmax(-1).unique()) > 1


@pytest.mark.accept
def test_a_compiled_model_trains_and_routes_the_same(base, found):
    """One graph; the loss of the routers included."""
    model, (ids, labels) = mixture(base, found).train(), batch()
    call = dict(input_ids=ids, labels=labels, domain=torch.tensor([0, 1, 2, 0]), use_cache=False)
    compiled, seen = torch.compile(model, backend="aot_eager", fullgraph=True), []
    for run in (model, compiled):
        procedures = [train.MoARouting()]
        optimizer = train.build_optimizer(model, procedures, torch.optim.SGD, lr=0.0)
        with train.attach(run, optimizer, procedures):
            loss = run(**call).loss
            loss.backward()
        seen.append({"loss": loss.detach()} | gradients(model))
        model.zero_grad()
    assert seen[0].keys() == seen[1].keys()
    for n in seen[0]:
        assert_fp64(seen[1][n], seen[0][n], n)
    model.eval()
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        assert_fp64(compiled(ids, use_cache=False).logits, want, "routed")


# state: reference forwards, micro-batches, checkpointing


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_with_a_reference_forward_and_checkpointing(base, found, reentrant):
    """DPO-style: a forward with adapters off, and evaluation forwards of other sequences, stand before the backward."""
    call = dict(zip(("input_ids", "labels"), batch(), strict=True)) | {"domain": [2, 0, 1, 1]}
    other = dict(zip(("input_ids", "labels"), batch(rows=6, seed=9), strict=True))
    seen = []
    for disturbed in (False, True):
        model = mixture(base, found).train()
        if disturbed and reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        _, runner = trained(model, train.MoARouting())
        with runner:
            loss = model(**call).loss
            if disturbed:
                plain = base(call["input_ids"]).logits
                with torch.no_grad(), fastpeft.adapters_off(model):
                    assert_fp64(model(**call).logits, plain, "the reference")
                with torch.no_grad(), runner.quiet():
                    model(**other)
            loss.backward()
        seen.append({"loss": loss.detach()} | gradients(model))
    assert seen[0].keys() == seen[1].keys()
    for n in seen[0]:
        assert_fp64(seen[1][n], seen[0][n], n)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_second_forward_before_the_first_ones_backward(base, found, reentrant):
    """Each backward recomputes with its own forward's experts; one backward through both raises where they chose other ones."""
    one = dict(zip(("input_ids", "labels"), batch(), strict=True)) | {"domain": [2, 0, 1, 1]}
    two = dict(zip(("input_ids", "labels"), batch(seed=8), strict=True)) | {"domain": [0, 1, 2, 0]}
    model = with_masks(mixture(base, found).train())
    for call in (one, two):
        model(**call).loss.backward()
    want = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    losses = [model(**call).loss for call in (one, two)]
    losses[0].backward()
    losses[1].backward()
    got = gradients(model)
    assert got.keys() == want.keys()
    for n in want:
        assert_fp64(got[n], want[n], n)
    with pytest.raises(RuntimeError, match="2 forwards that chose other experts"):
        (model(**one).loss + model(**two).loss).backward()
    model.zero_grad()
    (model(**one).loss + model(**(two | {"domain": one["domain"]})).loss).backward()  # the same experts: nothing to confuse


def test_one_backward_through_two_forwards_without_checkpointing(base, found):
    one = dict(zip(("input_ids", "labels"), batch(), strict=True)) | {"domain": [2, 0, 1, 1]}
    two = dict(zip(("input_ids", "labels"), batch(seed=8), strict=True)) | {"domain": [0, 1, 2, 0]}
    model = with_masks(mixture(base, found).train())
    seen = []
    for together in (False, True):
        losses = [model(**one).loss, model(**two).loss]
        for loss in [sum(losses)] if together else losses:
            loss.backward()
        seen.append(gradients(model))
        model.zero_grad()
    for n in seen[0]:
        assert_fp64(seen[1][n], seen[0][n], n)


def test_a_part_checkpointed_by_hand(base, found):
    """A checkpoint inside a block, where no hook of ours runs again."""
    model, call = with_masks(mixture(base, found).train()), dict(zip(("input_ids", "labels"), batch(), strict=True)) | {"domain": [2, 0, 1, 1]}
    model(**call).loss.backward()
    want = gradients(model)
    model.zero_grad()
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False)
    loss = model(**call).loss
    with torch.no_grad():
        model(batch(seed=4)[0])
    loss.backward()
    for n, g in gradients(model).items():
        assert_fp64(g, want[n], n)


def test_a_layer_outside_of_a_forward_of_the_model_raises(base, found):
    model, (ids, _) = mixture(base, found), batch()
    with pytest.raises(RuntimeError, match="outside of a forward of the adapted model"):
        model.model(ids)
    with domains.using_expert(model, "law"):
        assert_fp64(model.model(ids)[0], single(base, found["law"]).model(ids)[0], "fixed")


# experts: fixed, disabled, added


def test_a_fixed_expert_merges_and_exports(base, found, tmp_path):
    model, (ids, _) = mixture(base, found), batch()
    with pytest.raises(ValueError, match="token-dependent"):
        fastpeft.merge(model)
    domains.use_expert(model, "code")
    want = single(base, found["code"])(ids).logits
    assert_fp64(model(ids).logits, want, "fixed")
    fastpeft.export_lora(model, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out"), autocast_adapter_dtype=False).eval()
    assert_fp64(theirs(ids).logits, want, "exported")
    fastpeft.export_expert(model, tmp_path / "news", "news")
    assert_fp64(single(base, tmp_path / "news")(ids).logits, single(base, found["news"])(ids).logits, "news")
    assert_fp64(fastpeft.merge(model)(ids).logits, want, "merged")


def test_a_disabled_expert_is_never_chosen_and_stays_so_in_a_folder(base, found, tmp_path):
    model, (ids, _) = mixture(base, found), batch(rows=24)
    with torch.no_grad():
        model(ids)
    before = domains.choices(model)
    assert any(bool((c == 1).any()) for c in before.values())
    domains.disable_expert(model, "code")
    with torch.no_grad():
        model(ids)
    after = domains.choices(model)
    assert not any(bool((c == 1).any()) for c in after.values())
    first = next(iter(before))
    kept = before[first] != 1
    assert torch.equal(after[first][kept], before[first][kept]), "the others keep what they had"
    with pytest.raises(ValueError, match="a disabled one"):
        model(ids, domain=[1] * 24)
    fastpeft.save_adapter(model, tmp_path / "saved")
    again = copy.deepcopy(base)
    fastpeft.load_adapter(again, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="use_expert: 'code' is disabled"):
        domains.use_expert(again, 1)
    domains.disable_expert(model, "law")
    with pytest.raises(ValueError, match="no other is left"):
        domains.disable_expert(model, "news")
    domains.enable_expert(model, "code")
    domains.enable_expert(model, "law")
    with torch.no_grad():
        model(ids)
    assert all(torch.equal(before[n], c) for n, c in domains.choices(model).items())


@pytest.mark.parametrize("fresh", [True, False])
def test_an_added_expert_leaves_the_old_domains_as_they_were(base, found, tmp_path, fresh):
    old = {n: found[n] for n in ("law", "code")}
    model, (ids, labels) = mixture(base, old, router_bias=True), batch(rows=8)
    with torch.no_grad():
        routed = model(ids).logits
        labelled = model(ids, domain=[0, 1] * 4).logits
    report = domains.add_expert(model, **({"rank": 3} if fresh else {"folder": found["news"]}), name="news")
    model.eval()
    assert len(report.adapted) == 14 and routing_of(model, "test").names == ("law", "code", "news")
    if not fresh:
        assert_fp64(model(ids, domain=[2] * 8).logits, single(base, found["news"])(ids).logits, "the new one")
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains and not any("old_" in n for n in trains)
    optimizer, runner = trained(model, train.MoARouting(), weight_decay=0.1)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with runner:
        for _ in range(2):
            model.train()
            model(ids, labels=labels, domain=[2, 2, 0, 1, 2, 2, 0, 1]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trains, "the new expert and its rows train, nothing else"
    model.eval()
    domains.disable_expert(model, "news")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, routed)
        assert torch.equal(model(ids, domain=[0, 1] * 4).logits, labelled)
    domains.enable_expert(model, "news")
    fastpeft.save_adapter(model, tmp_path / "three")
    again = copy.deepcopy(base)
    fastpeft.load_adapter(again, tmp_path / "three")
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    fastpeft.export_expert(model, tmp_path / "code", "code")
    assert_fp64(single(base, tmp_path / "code")(ids).logits, single(base, found["code"])(ids).logits, "an old one exported")


# which layers, which blocks


def test_layers_outside_of_blocks_are_reported_or_refused(base, found, tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layers = nn.Linear(8, 8), nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2))

        def forward(self, x):
            x = self.embed(x)
            for layer in self.layers:
                x = layer(x)
            return x

    model = Model()
    report = fastpeft.adapt(model, "moa")
    assert report.skipped == {"embed": "it lies in no block"} and len(report.adapted) == 4
    assert sorted(routing_of(model, "test").routers) == ["layers.0", "layers.1"]
    model.eval()(torch.randn(3, 5, 8))
    assert all(c.shape == (3,) for c in domains.choices(model).values())
    fastpeft.unload(model)
    with pytest.raises(ValueError, match="embed lie in no block"):
        fastpeft.adapt(model, "moa", target_modules=["embed", "layers.0.0"])
    with pytest.raises(ValueError, match="names no module"):
        fastpeft.adapt(model, "moa", blocks=["nothing"])
    fastpeft.adapt(model, "moa", blocks=r"embed|layers\.0")
    assert sorted(routing_of(model, "test").routers) == ["embed", "layers.0"]
    fastpeft.unload(model)
    fastpeft.adapt(Model(), "lora", target_modules=["embed"])


def test_the_routers_start_small_and_count(base):
    model = copy.deepcopy(base)
    report = fastpeft.adapt(model, "moa", experts=4)
    routers = routing_of(model, "test").routers
    R = torch.cat([r.R.flatten() for r in routers.values()])
    assert len(routers) == 2 and R.numel() == 2 * 4 * 32
    assert abs(R.std().item() - 0.02) < 0.004 and abs(R.mean().item()) < 0.004
    assert report.procedures == ["MoARouting"]
    assert {k: v for k, (_, v) in report.shared.items()} == {"adapter_shared.moa_model_layers_0": 128, "adapter_shared.moa_model_layers_1": 128}


# errors


def test_training_needs_its_procedure_and_labels(base, found):
    model, (ids, labels) = mixture(base, found).train(), batch()
    with pytest.raises(RuntimeError, match=r"attach fastpeft\.train\.MoARouting"):
        model(ids, labels=labels, domain=[0] * 4)
    optimizer, runner = trained(model, train.MoARouting())
    with runner, pytest.raises(RuntimeError, match="labels of its domains"):
        model(ids, labels=labels)
    with pytest.raises(ValueError, match="without a moa layer"), train.attach(base, optimizer, [train.MoARouting()]):
        pass


def test_bad_calls(base, found):
    model, (ids, _) = mixture(base, found), batch()
    with pytest.raises(ValueError, match="no expert 'art'"):
        model(ids, domain=["art"] * 4)
    with pytest.raises(ValueError, match=r"domain holds \[3\]"):
        model(ids, domain=torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="names, or integers"):
        model(ids, domain=torch.tensor([0.0] * 4))
    with pytest.raises(RuntimeError, match="reads 4 sequences, and there are decisions or labels for 2"):
        model(ids, domain=[0, 1])
    with pytest.raises(ValueError, match="prompt_mask is list"):
        model(ids, prompt_mask=[1, 1])
    with pytest.raises(ValueError, match="row 0 has no prompt token"):
        model(ids, labels=ids)
    with pytest.raises(ValueError, match="position_ids start again"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))
    with pytest.raises(ValueError, match="cu_seq_lens_q packs"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 4, 9]))
    with pytest.raises(ValueError, match=r"attention_mask is \(4, 1, 9, 9\)"):
        model(ids, attention_mask=torch.ones(4, 1, 9, 9, dtype=DT))
    assert routing_of(model, "test").now is None
    with domains.using_expert(model, 0), pytest.raises(ValueError, match="expert 'law' is fixed"):
        model(ids, domain=[1] * 4)
    model(ids)  # and it works on


def test_flattened_tokens_are_routed_where_their_order_is_known(base, found):
    """All tokens of a batch in their order (OPT's FFN) are; some of them, or those of a list of experts, are not."""
    model, (ids, _) = mixture(base, found), batch()
    call = dict(input_ids=ids, domain=[0, 1, 2, 1])
    want = model(**call).logits
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x.flatten(0, 1)).view_as(x)
    assert_fp64(model(**call).logits, want, "flattened")
    mlp.up_proj.adapter.moa.layer = "model.layers.0.mlp.experts.0.up_proj"
    with pytest.raises(ValueError, match=r"reads rows \(36,\), and its block \(4, 9\); which of them"):
        model(**call)
    mlp.up_proj.adapter.moa.layer = "model.layers.0.mlp.up_proj"
    mlp.forward = lambda x: forward(x.flatten(0, 1)[:20])
    with pytest.raises(ValueError, match=r"reads rows \(20,\)"):
        model(**call)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(pool="max"), "pool='max'; it must be one of 'mean', 'last'"),
        (dict(prompt="none"), "prompt='none'"),
        (dict(choice="soft"), "choice='soft'"),
        (dict(frozen=2), "frozen=2"),
        (dict(experts=0), "experts=0"),
    ],
)
def test_bad_options(base, options, words):
    model = copy.deepcopy(base)
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=words):
        fastpeft.adapt(model, "moa", **options)
    assert {n: type(m) for n, m in model.named_modules()} == before


def test_an_encoder_decoder_is_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        fastpeft.adapt(transformers.T5ForConditionalGeneration(config), "moa")


def test_a_copy_routes_by_itself(base, found):
    model, (ids, _) = mixture(base, found), batch(rows=12)
    with torch.no_grad():
        want = model(ids).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(ids).logits, want)
        perturb(twin, 3.0)
        twin(ids)
        theirs = domains.choices(twin)
        assert torch.equal(model(ids).logits, want)
    assert any(not torch.equal(theirs[n], c) for n, c in domains.choices(model).items())
    domains.use_expert(twin, 0)
    assert routing_of(model, "test").fixed is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastpeft.unload(model)
    assert torch.equal(model(ids).logits, base(ids).logits)


def test_what_an_unused_expert_computes_is_not_read():
    """Its ranks are set to zero, and not multiplied by it: Inf and NaN stay out."""
    model, x = nn.Sequential(nn.Linear(4, 4, dtype=DT)), rand(2, 3, 4)
    fastpeft.adapt(model, "moa", experts=2, rank=2)
    perturb(model).eval()
    m = model[0].adapter.moa
    want = model(x, domain=[0, 0])
    with torch.no_grad():
        m.A[m.experts.span(1)] = torch.inf
    assert torch.equal(model(x, domain=[0, 0]), want)


def buffers(rows=6, length=9):
    """Two prompts of 5 tokens that the routers tell apart, in one buffer each."""
    return batch(rows=rows, length=length, seed=3)[0], batch(rows=rows, length=length, seed=4)[0]


def test_a_kept_decision_belongs_to_the_tokens_that_were_read(base, found):
    """Without a cache: another text written into the same buffer is a new prompt."""
    model, (first, other) = mixture(base, found), buffers()
    with torch.no_grad():
        model(other[:, :6])
        want = domains.choices(model)
        model(first[:, :5])
        kept = domains.choices(model)
        model(first[:, :6])
        assert all(torch.equal(kept[n], c) for n, c in domains.choices(model).items()), "one more token: kept"
        buffer = first.clone()
        model(buffer[:, :5])
        buffer.copy_(other)
        model(buffer[:, :6])
    assert all(torch.equal(want[n], c) for n, c in domains.choices(model).items())
    assert any(not torch.equal(want[n], c) for n, c in kept.items())


def test_disabling_and_training_end_a_kept_decision(base, found):
    model, (ids, _) = mixture(base, found), buffers(rows=24)
    with torch.no_grad():
        model(ids[:, :5])
    assert any(bool((c == 1).any()) for c in domains.choices(model).values())
    domains.disable_expert(model, "code")
    with torch.no_grad():
        model(ids[:, :6])
    assert not any(bool((c == 1).any()) for c in domains.choices(model).values())
    routing = routing_of(model, "test")
    assert routing.decoded is not None
    with_masks(model.train())(ids, domain=[0] * 24)
    assert routing.decoded is None


def test_an_expert_is_added_with_rows_that_train_and_stays_out_of_new_blocks_if_disabled(base, tmp_path):
    """The folder that is added has a block that the others lack."""
    short = {name: {"rank": 2, "alpha": 2, "target_modules": r".*layers\.0\..*q_proj"} for name in ("law", "code")}
    found = folders(base, tmp_path, short | {"news": {"rank": 2, "alpha": 2, "target_modules": ["q_proj"]}})
    model = mixture(base, {n: found[n] for n in short}, train_router=False)
    domains.disable_expert(model, "code")
    domains.add_expert(model, found["news"], name="news")
    routers = routing_of(model, "test").routers
    assert len(routers) == 2 and all(r.allowed.tolist() == [True, False, True] for r in routers.values())
    assert all(r.R.requires_grad and not r.old_R.requires_grad for r in routers.values())


def test_predictions_of_a_vote_are_the_routers_own(base, found):
    model, voting, (ids, _) = mixture(base, found), mixture(base, found, choice="vote"), batch(rows=12)
    with torch.no_grad():
        model(ids)
        voting(ids)
    want = domains.choices(model)
    got = domains.predictions(voting)
    assert set(got) == set(want) and all(torch.equal(got[n], c) for n, c in want.items())
