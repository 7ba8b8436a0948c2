"""Generation with an adapted model against a model whose layers are written by hand."""

from __future__ import annotations

import torch


def prompts():
    """Rows of 5, 3 and 4 tokens, padded on the left: ids and attention mask."""
    ids = torch.randint(2, 64, (3, 5))
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[2, :1] = 0
    ids[mask == 0] = 1
    return ids, mask


def assert_generates(model, hand, plain, beams):
    """With and without a cache, batched and padded on the left, `model` says what `hand` says of each row alone, whole in every step.

    plain: the model without adapters, which says something else of each.
    """
    ids, mask = prompts()
    how = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=beams, pad_token_id=1)
    rows = [r[m == 1][None] for r, m in zip(ids, mask, strict=True)]
    want = [hand.generate(r, attention_mask=torch.ones_like(r), use_cache=False, **how)[0, -5:] for r in rows]
    without = [plain.generate(r, attention_mask=torch.ones_like(r), **how)[0, -5:] for r in rows]
    assert all(not torch.equal(w, o) for w, o in zip(want, without, strict=True)), "the adapter changes nothing"
    for cache in (True, False):
        got = model.generate(ids, attention_mask=mask, use_cache=cache, **how)[:, -5:]
        assert torch.equal(got, torch.stack(want)), f"use_cache={cache}"
