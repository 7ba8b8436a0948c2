"""The example of each method's page: adapt, three steps as the method trains, save. Every one runs in tests/test_pages.py."""

from __future__ import annotations

from fastpeft.catalogue import MethodInfo
from fastpeft.registry import Recipe

MODEL = """\
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastpeft
{imports}
# a small random model; yours comes from from_pretrained
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4))
ids = torch.randint(0, 64, (4, 16))
"""
ADAPT = """
print(fastpeft.adapt(model, {call}))
"""
PLAIN = """
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for _ in range(3):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""
PROCEDURE = """
procedures = [train.{procedure}]
optimizer = train.build_optimizer(model, procedures, torch.optim.AdamW, lr=1e-3)
with train.attach(model, optimizer, procedures, total_steps=3) as runner:
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        runner.step_end()
"""
SAVE = """
fastpeft.save_adapter(model, "my-adapter")
"""
MERGE = """\
fastpeft.merge(model)
"""

# adapt's options, where the defaults are made for larger layers
OPTIONS = {"rosa": "rank=8, density=0.01", "galore": "rank=16, gap=2"}
# the procedure as this run of three steps needs it
CALLS = {
    "AdaLoRASchedule": "AdaLoRASchedule(target_rank=4)",
    "ALoRAAllocation": 'ALoRAAllocation(lambda k: {"input_ids": held_out, "labels": held_out}, warmup=1, interval=1, rounds=1)',
    "BiLoRABilevel": 'BiLoRABilevel(lambda k: {"input_ids": held_out, "labels": held_out})',
    "DeltaLoRASchedule": "DeltaLoRASchedule(start=1)",
    "LISASchedule": "LISASchedule(active=1, interval=2)",
    "PeriodicLoRASchedule": "PeriodicLoRASchedule(steps=2)",
    "RoSASchedule": 'RoSASchedule("wl1")',
    "SoRASchedule": "SoRASchedule(xi=1e-3)",
}
HELD_OUT = """\
held_out = torch.randint(0, 64, (4, 16))  # data that the steps do not see
"""
EXPERTS = """
# two LoRAs, trained each on data of its own (here: not trained)
for name in ("law", "code"):
    fastpeft.adapt(model, "lora", rank=4)
    fastpeft.save_adapter(model, f"lora-{name}")
    fastpeft.unload(model)
"""
MOA = (
    EXPERTS
    + """
print(fastpeft.adapt(model, "moa", experts={"law": "lora-law", "code": "lora-code"}))
domains = ["law", "law", "code", "code"]  # of the four rows of ids
labels = ids.clone()
labels[:, :8] = -100  # the prompt, by which the routers choose

procedures = [train.MoARouting()]
optimizer = train.build_optimizer(model, procedures, torch.optim.AdamW, lr=1e-3)
with train.attach(model, optimizer, procedures) as runner:
    for _ in range(3):
        model(input_ids=ids, labels=labels, domain=domains).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        runner.step_end()
model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))  # the routers choose
"""
    + SAVE
)
PHATGOOSE = (
    EXPERTS
    + """
# each one's gate, on the same data
for name in ("law", "code"):
    fastpeft.adapt(model, "phatgoose", experts=[f"lora-{name}"], stage="gate")
"""
    + PLAIN.replace("\n", "\n    ").lstrip("\n").replace("\n    \n", "\n").rstrip()
    + """
    fastpeft.save_adapter(model, f"gated-{name}")
    fastpeft.unload(model)

print(fastpeft.adapt(model, "phatgoose", experts={"law": "gated-law", "code": "gated-code"}))
model.eval()(input_ids=ids)  # every token chooses at every layer; nothing trains any more
"""
    + SAVE
)
# after the adapter is saved
AFTER = {
    "laplace": """
# a posterior over A and B from one pass over the training data; here the answers are tokens 3 and 5, labelled 0 and 1
loader = [{"input_ids": ids, "labels": torch.tensor([0, 1, 1, 0])}]
posterior = laplace.fit(model, loader, logits=laplace.answers([3, 5]))
posterior.tune()
print(posterior.predict(loader[0]))  # probabilities [samples, answers]
posterior.save("my-adapter")
""",
    "o_lora": "\ntrain.next_task(model)  # freezes what was learned; the next task trains new factors, with a new optimizer\n",
}


def example(m: MethodInfo, r: Recipe) -> str:
    """The code of a method's page."""
    procedure = r.cls.PROCEDURE
    imports = "from fastpeft import train\n" if procedure else "from fastpeft import laplace\n" if m.name == "laplace" else ""
    head = MODEL.format(imports=imports)
    if m.name == "moa":
        return head + MOA
    if m.name == "phatgoose":
        return MODEL.format(imports="") + PHATGOOSE
    call = CALLS.get(procedure, f"{procedure}()")
    options = OPTIONS.get(m.name, "rank=8" if "rank" in m.options and m.options["rank"] is not None else "")
    body = PROCEDURE.format(procedure=call) if procedure else PLAIN
    held = HELD_OUT if "held_out" in call else ""
    adapt = ADAPT.format(call=", ".join(filter(None, [f'"{m.name}"', options])))
    return head + held + adapt + body + SAVE + AFTER.get(m.name, "") + (MERGE if m.mergeable and m.name not in AFTER else "")
