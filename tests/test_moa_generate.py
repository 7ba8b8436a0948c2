"""Mixture-of-LoRAs in generate(): the prompt decides, and every later token keeps to it."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import DT
from mixtures import EXPERTS, folders, mixture, single

import fastpeft
from fastpeft import domains
from fastpeft.routing_hooks import routing_of

pytest.importorskip("transformers")
NAMES = list(EXPERTS)
BLOCKS = ["model.layers.0", "model.layers.1"]


@pytest.fixture
def base(llama):
    return llama.to(DT)


@pytest.fixture
def found(base, tmp_path):
    return folders(base, tmp_path)


def generate(model, ids, attention=None, new=7, **options):
    """The new tokens only."""
    attention = torch.ones_like(ids) if attention is None else attention
    out = model.generate(
        ids, attention_mask=attention, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **options
    )
    return out[:, ids.shape[1] :]


def prompts(rows=6, length=6, seed=11):
    return torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def decisions(model, ids):
    """Block -> [rows], as a forward of the prompts alone decides."""
    routing_of(model, "test").decoded = None
    with torch.no_grad():
        model(ids)
    found = domains.choices(model)
    routing_of(model, "test").decoded = None
    return found


def by_hand(base, found, per_block, row, ids, new=7):
    """Greedy tokens of one prompt from a model without any router, whose two blocks carry the LoRAs of these decisions."""
    model = copy.deepcopy(base)
    fastpeft.adapt(model, "lora", rank=3, alpha=3, rank_pattern={".*": 8})
    for block in BLOCKS:
        donor = single(base, found[NAMES[int(per_block[block][row])]])
        for name, module in model.named_modules():
            if name.startswith(f"{block}.") and hasattr(module, "adapter"):
                source, own = donor.get_submodule(name), module.adapter.lora
                with torch.no_grad():
                    own.A.zero_(), own.B.zero_()
                    if hasattr(source, "adapter"):
                        theirs = source.adapter.lora
                        own.A[: len(theirs.A)] = theirs.A
                        own.B[:, : len(theirs.A)] = theirs.B * (theirs.scale / own.scale)
    for _ in range(new):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[:, -new:]


def test_greedy_tokens_equal_those_of_the_experts_composed_by_hand(base, found):
    """In a batch whose rows and blocks decide differently, with a cache and without."""
    model, ids = mixture(base, found), prompts()
    per_block = decisions(model, ids)
    assert len(torch.stack(list(per_block.values())).unique()) == 3 and not torch.equal(*per_block.values())
    want = torch.cat([by_hand(base, found, per_block, row, ids[row : row + 1]) for row in range(len(ids))])
    assert torch.equal(generate(model, ids), want)
    assert torch.equal(generate(model, ids, use_cache=False), want)
    assert not torch.equal(generate(base, ids), want)


def test_left_padding_and_batch_change_nothing(base, found):
    model, ids = mixture(base, found), prompts(rows=5, length=8)
    lengths = [8, 5, 3, 7, 4]
    attention = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        attention[row, 8 - n :] = 1
    ids = torch.where(attention == 1, ids, 0)
    want = torch.cat([generate(model, ids[row : row + 1, 8 - n :]) for row, n in enumerate(lengths)])
    for cached in (True, False):
        assert torch.equal(generate(model, ids, attention, use_cache=cached), want), cached
    assert len({tuple(row) for row in want.tolist()}) > 1


@pytest.mark.parametrize("cached", [True, False])
def test_beams(base, found, cached):
    """Each prompt's beams use its experts, and equal those of the model that has them fixed."""
    model, ids = mixture(base, found, choice="vote"), prompts(rows=3)
    per_block = decisions(model, ids)[BLOCKS[0]]
    assert len(per_block.unique()) > 1
    got = generate(model, ids, num_beams=3, use_cache=cached)
    for row, z in enumerate(per_block.tolist()):
        want = generate(single(base, found[NAMES[z]]), ids[row : row + 1], num_beams=3)
        assert torch.equal(got[row : row + 1], want), row
    assert not torch.equal(got, generate(model, ids, use_cache=cached)), "the beams found nothing that greedy does not"


def test_the_prefill_decides_once_and_decoding_keeps_it(base, found):
    model, ids = mixture(base, found), prompts()
    per_block = decisions(model, ids)
    calls, counted = [], type(routing_of(model, "test").routers[BLOCKS[0]]).logits
    for router in routing_of(model, "test").routers.values():
        router.logits = lambda h, r=router: calls.append(r.block) or counted(r, h)
    for cached in (True, False):
        generate(model, ids, use_cache=cached)
        assert calls == BLOCKS, "each router once, in the prefill"
        assert all(torch.equal(per_block[n], c) for n, c in domains.choices(model).items())
        calls.clear()


def test_two_generations_at_a_time(base, found):
    """A cache carries its own decisions: two sequences decoded in turns, other forwards and a reference pass in between."""
    model = mixture(base, found)
    one, two = prompts(rows=2, seed=1), prompts(rows=2, seed=2)
    want = [generate(model, ids, new=5) for ids in (one, two)]
    assert any(not torch.equal(a, b) for a, b in zip(decisions(model, one).values(), decisions(model, two).values(), strict=True))
    states = []
    with torch.no_grad():
        for ids in (one, two):
            out = model(ids, use_cache=True)
            states.append((out.cache, out.logits[:, -1:].argmax(-1), []))
        for _ in range(5):
            for k, (cache, token, seen) in enumerate(states):
                seen.append(token)
                out = model(token, cache=cache)
                states[k] = (cache, out.logits[:, -1:].argmax(-1), seen)
                with fastpeft.adapters_off(model):
                    model(prompts(rows=3, seed=5))
                model(prompts(rows=4, seed=6))
    for (_, _, seen), tokens in zip(states, want, strict=True):
        assert torch.equal(torch.cat(seen, 1), tokens)


def test_a_cache_without_decisions_raises(base, found):
    model, ids = mixture(base, found), prompts(rows=2)
    with torch.no_grad():
        with fastpeft.adapters_off(model):
            cache = model(ids, use_cache=True).cache
        with pytest.raises(RuntimeError, match="comes from no routed forward"):
            model(ids[:, :1], cache=cache)
        cache = model(ids, use_cache=True).cache
        with pytest.raises(RuntimeError, match="reads 1 sequences, and there are decisions or labels for 2"):
            model(ids[:1, :1], cache=cache)
        with pytest.raises(ValueError, match="whose prefill decided already"):
            model(ids[:, :1], cache=cache, domain=[0, 1])
        with pytest.raises(ValueError, match="cache is a tuple"):
            model(ids[:, :1], cache=((ids, ids),))


def test_a_new_text_decides_anew(base, found):
    """Without a cache, only the same prompt that grew by one token is a continuation."""
    model, ids = mixture(base, found), prompts(rows=4, length=10)
    for before, after in ((ids[:, :6], ids[:, :8]), (ids[:, :6], ids[:, 1:8]), (ids[:2, :6], ids[:, :7])):
        want = decisions(model, after)
        with torch.no_grad():
            model(before)
            model(after)
        assert all(torch.equal(want[n], c) for n, c in domains.choices(model).items())
    kept = decisions(model, ids[:, :6])
    with torch.no_grad():
        model(ids[:, :6])
        model(ids[:, :7])
        model(ids[:, :8])
    assert all(torch.equal(kept[n], c) for n, c in domains.choices(model).items())


def test_a_labelled_forward_and_training_decide_for_themselves(base, found):
    model, ids = mixture(base, found), prompts(rows=3, length=8)
    with torch.no_grad():
        model(ids[:, :6])
        model(ids[:, :7], domain=[1, 1, 1])
    assert all(bool((c == 1).all()) for c in domains.choices(model).values())
    want = decisions(model, ids[:, :7])
    with torch.no_grad():
        model(ids[:, :6])
    model(ids[:, :7])  # with gradients
    assert all(torch.equal(want[n], c) for n, c in domains.choices(model).items())


def test_a_fixed_expert_generates_as_its_lora(base, found):
    model, ids = mixture(base, found), prompts(rows=3)
    with domains.using_expert(model, "news"):
        for cached in (True, False):
            assert torch.equal(generate(model, ids, use_cache=cached), generate(single(base, found["news"]), ids))
