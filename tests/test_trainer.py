"""ProcedureCallback: under Transformers' Trainer a procedure does what it does in a plain loop, bit for bit."""

from __future__ import annotations

import copy
import gc
import shutil

import pytest
import torch
from checks import DT
from loops import CASES, MORE, Case, Net, assert_same, examples, micro_batches, plain, trainer_of
from tolerance import assert_fp64
from torch.utils.data import IterableDataset

from fastpeft import train
from fastpeft.method.dylora import DyLoRA

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from fastpeft.integrations.transformers import ProcedureCallback

every = pytest.mark.parametrize("name", list(CASES))
STATE = "fastpeft_procedures.pt"


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """A Trainer collects garbage when it starts: half a second over all that is imported, which is set apart here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@every
@pytest.mark.parametrize("accumulation", [1, 3])
def test_same_bits_as_in_a_plain_loop(name, accumulation, tmp_path):
    """20 steps over epochs of 13 batches: with accumulation 3 the last step of each has one micro-batch."""
    parts = CASES[name].begin()
    model, start = parts[0], copy.deepcopy(parts[0])
    trainer = trainer_of(parts, tmp_path, accumulation)
    trainer.train()
    assert trainer.state.global_step == 20
    assert_same(model, plain(CASES[name], 20, accumulation))
    with pytest.raises(AssertionError):
        assert_same(model, start)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@every
def test_a_resumed_run_ends_with_the_same_bits(name, tmp_path):
    """Cut at step 7: of RoSA while it collects. Batches in random order, and dropout in the adapters."""
    case = CASES[name]
    case = Case(case.method, case.procedures, case.options | {"dropout": 0.2}, case.optimizer)
    arguments = dict(save_strategy="steps", save_steps=7, train_sampling_strategy="random")
    whole = case.begin()
    trainer_of(whole, tmp_path, 3, **arguments).train()
    assert (tmp_path / "checkpoint-7" / STATE).is_file()
    resumed = case.begin()
    trainer_of(resumed, tmp_path, 3, **arguments).train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert_same(resumed[0], whole[0])
    assert all(m.dropout == 0.2 for m in whole[0].up.adapter.methods().values())


@pytest.mark.parametrize("name", list(MORE))
def test_procedures_with_a_schedule_over_steps_and_epochs(name, tmp_path):
    """As the two tests before: the total of steps and the ends of epochs arrive, and a run resumed in its second epoch goes on."""
    case, arguments = MORE[name], dict(save_strategy="steps", save_steps=7)
    whole, resumed = case.begin(), case.begin()
    trainer_of(whole, tmp_path, 3, **arguments).train()
    assert_same(whole[0], plain(case, 20, 3))
    trainer_of(resumed, tmp_path, 3, **arguments).train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert_same(resumed[0], whole[0])


def test_a_bert_goes_through_a_schedule_and_a_checkpoint(tmp_path):
    """A PreTrainedModel, saved and read in Transformers' own layout."""
    import transformers

    config = transformers.BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    base = transformers.BertForSequenceClassification(config)
    data = [{"input_ids": torch.randint(0, 32, (6,)), "labels": torch.tensor(k % 2)} for k in range(14)]
    case = Case("rosa", lambda: [train.RoSASchedule("wl3", 3)], {"density": 0.1, "modules_to_save": ["classifier"]})
    whole, resumed = case.begin(base), case.begin(base)
    arguments = dict(steps=9, data=data, save_strategy="steps", save_steps=4)
    trainer_of(whole, tmp_path, 2, **arguments).train()
    trainer_of(resumed, tmp_path, 2, **arguments).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(resumed[0], whole[0])
    assert all(m.masked for m in train.rosa.sparse_layers(whole[0]).values())


# --- checkpoints that moved, or are another run's


def saved_run(tmp_path, case, **arguments):
    parts = case.begin()
    trainer_of(parts, tmp_path, 1, steps=6, save_strategy="steps", save_steps=3, **arguments).train()
    return parts[0]


def test_a_checkpoint_elsewhere_is_named_to_the_callback(tmp_path):
    case = CASES["rosa"]
    whole = saved_run(tmp_path / "a", case)
    shutil.move(tmp_path / "a" / "checkpoint-3", tmp_path / "kept")
    for resume_from, error in ((None, FileNotFoundError), (tmp_path / "kept", None)):
        model, procedures, optimizer = case.begin()
        callback = ProcedureCallback(procedures, resume_from=resume_from)
        trainer = trainer_of((model, procedures, optimizer), tmp_path / "b", 1, steps=6, callback=callback)
        if error is None:
            trainer.train(resume_from_checkpoint=str(tmp_path / "kept"))
            assert_same(model, whole)
        else:
            with pytest.raises(error, match=r"resumes at step 3.*checkpoint-3.*does not exist.*resume_from=folder"):
                trainer.train(resume_from_checkpoint=str(tmp_path / "kept"))


@pytest.mark.parametrize("damage", ["another run", "truncated", "other content"])
def test_a_state_that_does_not_belong_is_refused(damage, tmp_path):
    case, words = CASES["dylora"], "damaged, or no state"
    saved_run(tmp_path, case)
    file = tmp_path / "checkpoint-3" / STATE
    if damage == "another run":
        saved_run(tmp_path / "other", case, seed=9, train_sampling_strategy="random")
        shutil.copy(tmp_path / "other" / "checkpoint-3" / STATE, file)
        words = "saved at step 3 beside other parameters"
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:100])
    else:
        torch.save([1], file)
    model, procedures, optimizer = case.begin()
    trainer = trainer_of((model, procedures, optimizer), tmp_path, 1, steps=6)
    with pytest.raises(ValueError, match=words):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not model._forward_pre_hooks


def test_other_settings_of_a_procedure_are_refused(tmp_path):
    saved_run(tmp_path, CASES["dylora"])
    other = Case("dylora", lambda: [train.DyLoRASampling(seed=1)])
    trainer = trainer_of(other.begin(), tmp_path, 1, steps=6)
    with pytest.raises(ValueError, match="DyLoRASampling: the state is of other draws"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


# --- steps that are none, epochs that end inside a step


class Draws(train.Procedure):
    """Writes down every event that says how a step ended."""

    def __init__(self):
        self.seen, self.total = [], None

    def on_train_begin(self, ctx):
        self.total = ctx.total_steps

    def after_backward(self, ctx, micro, is_last):
        self.seen.append(("backward", ctx.step, micro, is_last))

    def after_step(self, ctx, skipped):
        self.seen.append(("step", ctx.step, skipped))

    def on_epoch_end(self, ctx):
        self.seen.append(("epoch", ctx.step))

    def on_train_end(self, ctx):
        self.seen.append(("end", ctx.step))


def overflowing():
    """Ten examples, two to a batch; the loss and the gradients of batch 2 overflow."""
    data = examples(10)
    data[4]["labels"] = torch.full((16,), float("inf"), dtype=DT)
    return data


@pytest.mark.parametrize("name", ["dylora", "lora_fa", "dylora frozen, geometric, with LoRA+"])
def test_steps_that_the_scaler_skips(name, tmp_path):
    """What fp16 does, through accelerate's own optimiser wrapper: the Trainer counts the step, procedures do not."""
    case, told = CASES[name], Draws()
    case = Case(case.method, lambda: [*CASES[name].procedures(), told], case.options, case.optimizer)
    parts = case.begin()
    trainer = trainer_of(parts, tmp_path, 1, steps=8, data=overflowing(), max_grad_norm=0.0)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer.train()
    skipped = [s[2] for s in told.seen if s[0] == "step"]
    assert skipped == [k in (2, 7) for k in range(8)] and told.seen[-1] == ("end", 6) and trainer.state.global_step == 8
    assert_same(parts[0], plain(case, 8, 1, data=overflowing(), scaler=torch.amp.GradScaler("cpu", init_scale=4.0)))
    assert all(bool(p.isfinite().all()) for p in parts[0].parameters())


def test_the_last_step_of_an_epoch_has_its_own_length(tmp_path):
    """Seven batches, three to a step: 3, 3, 1. Also in the middle of a resumed epoch, and with ignore_data_skip."""
    pattern = [(0, False), (1, False), (2, True)] * 2 + [(0, True)]
    for resume, arguments, want in (
        (False, {}, pattern * 2),
        (True, {}, pattern[3:] + pattern),
        (True, {"ignore_data_skip": True}, pattern + pattern[:6]),
    ):
        told = Draws()
        case = Case("dylora", lambda told=told: [train.DyLoRASampling(), told])
        arguments |= {"steps": 6, "data": examples(14), "save_strategy": "steps", "save_steps": 1}
        trainer = trainer_of(case.begin(), tmp_path, 3, **arguments)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1") if resume else None)
        assert [s[2:] for s in told.seen if s[0] == "backward"] == want


class Stream(IterableDataset):
    """Fourteen examples whose number nobody knows."""

    def __iter__(self):
        return iter(examples(14))


def test_a_stream_whose_end_comes_inside_a_step(tmp_path):
    """No length, so no epochs: the Trainer adds the gradients of the seventh batch to the next step, and so do we."""
    told = Draws()
    case = Case("dylora", lambda: [train.DyLoRASampling(), told])
    parts = case.begin()
    trainer_of(parts, tmp_path, 3, steps=5, data=Stream()).train()
    micros = [s[2:] for s in told.seen if s[0] == "backward"]
    full = [(0, False), (1, False), (2, True)]
    assert micros == full * 2 + [(0, False), (1, False), (2, False), (3, True)] + full + [(0, False), (1, False), (2, False), (3, True)]
    assert [s for s in told.seen if s[0] in ("epoch", "end")] == [("epoch", 2), ("epoch", 4), ("end", 5)]

    model, procedures, optimizer = case.begin()
    with train.attach(model, optimizer, procedures, accumulation=4) as runner:
        first, second, rest = micro_batches(examples(14), 3)
        for micros in ([first], [second], [rest, first], [second], [rest, first]):
            for part in micros:
                for batch in part:
                    (model(**batch)["loss"] / len(part)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
    assert_same(parts[0], model)


# --- losses, evaluation, ends


class Penalty(train.Procedure):
    def extra_loss(self, ctx):
        return 0.1 * sum(p.square().sum() for p in train.optimizer.with_role(ctx.model, "up"))


def test_a_penalty_counts_once_where_the_trainer_normalises_by_tokens(gpt2, tmp_path):
    """A causal model gets num_items_in_batch and its loss is not divided by the accumulation; five batches, three to a step."""
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(0, 64, (5,), generator=generator) for _ in range(10)]
    data = [{"input_ids": t, "labels": t.index_fill(0, torch.arange(k % 4), -100)} for k, t in enumerate(texts)]
    case = Case("lora", lambda: [Penalty()], {"target_modules": ["c_attn"]})
    parts = case.begin(gpt2)
    trainer = trainer_of(parts, tmp_path, 3, steps=6, data=data)
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    model, procedures, optimizer = case.begin(gpt2)
    with train.attach(model, optimizer, procedures, accumulation=3) as runner:
        for micros in micro_batches(data, 3) * 3:
            model.train()
            runner.ctx.accumulation = len(micros)
            items = trainer._get_num_items_in_batch(micros, "cpu")
            for batch in micros:
                model(**batch, num_items_in_batch=items).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
    assert_same(parts[0], model)


def test_a_loss_that_the_trainer_computes_itself_takes_no_penalty(tmp_path):
    case = Case("lora", lambda: [Penalty()])
    trainer = trainer_of(case.begin(), tmp_path, 1)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: (outputs["logits"] - labels).square().mean()
    with pytest.raises(RuntimeError, match=r"Penalty adds a term to the loss.*no `loss` tensor"):
        trainer.train()


def test_evaluation_between_steps_is_at_full_rank_and_unseen(tmp_path):
    seen = {True: [], False: []}

    class Look(Net):
        def forward(self, x, labels=None):
            seen[self.training].append([m.b for m in self.modules() if isinstance(m, DyLoRA)])
            return super().forward(x, labels)

    torch.manual_seed(1)
    parts = CASES["dylora"].begin(Look())
    trainer = trainer_of(parts, tmp_path, 1, steps=12, eval_strategy="steps", eval_steps=2, eval_on_start=True, held=examples(4, seed=9))
    trainer.train()
    assert len(seen[True]) == 12 and {tuple(b) for b in seen[True]} == {(1, 1), (2, 2), (3, 3)}
    assert len(seen[False]) == 7 and all(b == [3, 3] for b in seen[False])


def test_training_stops_when_a_procedure_is_done(tmp_path):
    case = Case("rosa", lambda: [train.RoSASchedule("wl2", 3, after="save")], {"density": 0.2})
    parts = case.begin()
    trainer = trainer_of(parts, tmp_path, 2)
    trainer.train()
    assert trainer.state.global_step == 5
    train.save_masks(parts[0], tmp_path / "masks")


def test_epochs_and_the_end_are_told_once(tmp_path):
    told = Draws()
    case = Case("lora", lambda: [told])
    ends = [("epoch", 2), ("epoch", 4), ("end", 4)]
    trainer_of(case.begin(), tmp_path, 1, steps=-1, num_train_epochs=2, data=examples(4)).train()
    assert told.total == 4 and [s for s in told.seen if s[0] in ("epoch", "end")] == ends
    told.seen.clear()
    trainer_of(case.begin(), tmp_path, 1, steps=5, data=examples(4)).train()  # which stops within its third epoch
    assert told.total == 5 and [s for s in told.seen if s[0] in ("epoch", "end")] == [*ends[:2], ("end", 5)]


# --- what is refused


@pytest.mark.parametrize("name", ["rosa", "lora_plus"])
def test_an_optimiser_of_the_trainers_own_has_not_the_groups(name, tmp_path):
    model, procedures, _ = CASES[name].begin()
    trainer = trainer_of((model, procedures, None), tmp_path, 1)
    with pytest.raises(ValueError, match=r"ProcedureCallback: the optimiser has .* in one group.*build_optimizer"):
        trainer.train()
    assert not model._forward_pre_hooks


def test_an_optimiser_of_the_trainers_own_is_enough_where_groups_do_not_matter(tmp_path):
    model, procedures, _ = CASES["dylora"].begin()
    trainer_of((model, procedures, None), tmp_path, 1, steps=3, learning_rate=0.02, weight_decay=0.1, optim="adamw_torch").train()
    assert_same(model, plain(CASES["dylora"], 3, 1))


@pytest.mark.parametrize(
    ("arguments", "words"), [({"torch_compile": True}, "torch_compile=True would compile"), ({"n_gpu": 2}, "DataParallel")]
)
def test_where_procedures_cannot_run(arguments, words, tmp_path, monkeypatch):
    trainer = trainer_of(CASES["dylora"].begin(), tmp_path, 1)
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, ProcedureCallback)]
    for key, value in arguments.items():
        monkeypatch.setattr(type(trainer.args), key, value, raising=False)
        trainer.args.__dict__.pop(key, None)
    with pytest.raises(RuntimeError, match=f"procedures cannot run here: .*{words}"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=trainer.optimizer)


def test_two_callbacks_are_refused_and_a_failed_training_can_be_closed(tmp_path):
    model, procedures, optimizer = CASES["dylora"].begin()
    trainer = trainer_of((model, procedures, optimizer), tmp_path, 1, steps=3)
    trainer.add_callback(ProcedureCallback([train.DyLoRASampling()]))
    with pytest.raises(RuntimeError, match="has procedures attached already"):
        trainer.train()

    class Fails(train.Procedure):
        fails = True

        def before_step(self, ctx):
            if self.fails:
                raise KeyError

    model, _, optimizer = CASES["dylora"].begin()
    failing = Fails()
    first = ProcedureCallback([train.DyLoRASampling(), failing])
    trainer = trainer_of((model, [], optimizer), tmp_path, 1, steps=3, callback=first)
    with pytest.raises(KeyError):
        trainer.train()
    assert model._forward_pre_hooks
    first.close()
    assert not model._forward_pre_hooks and all(m.b == 3 for m in model.modules() if isinstance(m, DyLoRA))
    with pytest.raises(KeyError):
        trainer.train()
    failing.fails = False
    trainer.train()  # a new training takes the hooks of the failed one away
    assert not model._forward_pre_hooks


def test_events_outside_of_a_training_are_a_mistake(tmp_path):
    class Late(ProcedureCallback):
        def on_train_begin(self, *args, **kwargs):
            pass

    model, procedures, optimizer = CASES["dylora"].begin()
    trainer = trainer_of((model, procedures, optimizer), tmp_path, 1, callback=Late(procedures))
    with pytest.raises(RuntimeError, match="outside of a training"):
        trainer.train()


# --- what inherits from the Trainer


def test_trl(gpt2, tmp_path):
    import trl

    datasets = pytest.importorskip("datasets")
    case = Case("rosa", lambda: [train.RoSASchedule("wl2", 2)], {"target_modules": ["c_attn"], "density": 0.1})
    model, procedures, optimizer = case.begin(gpt2)
    rows = datasets.Dataset.from_list([{"input_ids": torch.arange(k, k + 6).tolist()} for k in range(12)])
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to="none",
        use_cpu=True, disable_tqdm=True, save_strategy="no", bf16=False, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, args=arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=[ProcedureCallback(procedures)],
        data_collator=language_batch,
        processing_class=tokenizer(tmp_path),
    )  # fmt: skip
    trainer.train()
    layers = train.rosa.sparse_layers(model)
    assert layers and all(m.masked and m.values.any() for m in layers.values())


def language_batch(rows):
    ids = torch.tensor([r["input_ids"] for r in rows])
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def tokenizer(folder):
    from job_models import tiny_model

    return tiny_model(folder, "gpt2")[1]


def test_a_compiled_model(tmp_path):
    model, procedures, optimizer = CASES["dylora"].begin()
    compiled = torch.compile(model, backend="aot_eager")
    trainer_of((compiled, procedures, optimizer), tmp_path, 2, steps=6).train()
    want = plain(CASES["dylora"], 6, 2)
    for (n, p), q in zip(model.state_dict().items(), want.state_dict().values(), strict=True):
        assert_fp64(p, q, n)
    assert not compiled._forward_pre_hooks
