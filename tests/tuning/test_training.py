"Tuning: nothing outside the mask moves, the rest is peft's own LoRA, and a killed run ends like an undisturbed one."
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from adapters import ARCHS, CONDITIONS, FAST, expected, is_column, is_row, loaded, rows, same_adapter, some
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.models.view import view
from langneuron_mi.testing.tiny import tiny_model
from langneuron_mi.tuning.neuron_lora import TuneConfig, TuningError
from langneuron_mi.tuning.rows import PadCollator, lm_dataset
from langneuron_mi.tuning.training import tune


def check_mask(model, arch, config, out, **kwargs):
    "Tune, merge, and compare every weight with a second model that nothing was done to."
    neurons = some(model) if config.mlp == "neurons" else None
    tuned = tune(model, kwargs.pop("data", rows()), neurons, config, out=out, **kwargs)
    before = {n: t for n, t in tiny_model(arch)[0].to(view(model).dtype).state_dict().items()}
    after = tuned.merged().state_dict()
    layers, width = view(model).shape
    every = dict(none=None, all=[torch.arange(width)]*layers)
    chosen = every[config.mlp] if neurons is None else [neurons.neurons_in(l) for l in range(layers)]
    moved = 0
    for name, old in before.items():
        if name not in after: continue
        diff = after[name].double() - old.double()
        inside = expected(name, old.shape, chosen, config.attention, arch)
        assert not diff[~inside].any(), name
        if inside.any():
            assert diff[inside].any(), name
            moved += int((diff != 0).sum())
    same = {n.replace("._original_component", ""): t for n, t in view(model).hf.state_dict().items()}
    assert all(torch.equal(same[n], t) for n, t in before.items())  # the caller's model
    assert moved and len(tuned.check())
    return tuned


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("arch", ARCHS)
def test_tuning_changes_nothing_outside_the_mask(arch, condition, tmp_path):
    check_mask(loaded(arch), arch, TuneConfig(**FAST | CONDITIONS[condition]), tmp_path)


@pytest.mark.parametrize("condition", ["own", "own, full rank"])
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd", "adafactor"])
def test_tuning_mask_holds_for_every_optimizer_and_dtype(optimizer, dtypes, condition, tmp_path):
    stored, computed = dtypes
    how = dict(optimizer=optimizer, dtype=computed, weight_decay=.5, lr=5. if optimizer == "sgd" else .1)
    config = TuneConfig(**FAST | CONDITIONS[condition] | how)
    tuned = check_mask(loaded("llama", getattr(torch, stored)), "llama", config, tmp_path)
    weights = load_file(tuned.adapter_dir/"adapter_model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}


@pytest.mark.parametrize("extra", [dict(gradient_checkpointing=True), dict(accumulation=3, batch_size=1)], ids=str)
def test_tuning_mask_holds_with_checkpointing_and_accumulation(extra, tmp_path):
    a = check_mask(loaded("gemma3"), "gemma3", TuneConfig(**FAST | extra), tmp_path/"a")
    if "gradient_checkpointing" in extra:
        b = check_mask(loaded("gemma3"), "gemma3", TuneConfig(**FAST), tmp_path/"b")
        same_adapter(a, b, atol=1e-6)


@pytest.mark.parametrize("arch", ["llama", "bloom"])
def test_tuning_sees_every_neuron_once_in_the_mask(arch, tmp_path):
    "The masked factors themselves are zero outside, not only their product."
    model = loaded(arch)
    neurons = some(model)
    tuned = tune(model, rows(), neurons, TuneConfig(**FAST | dict(weight_decay=.5)), out=tmp_path)
    for name, t in load_file(tuned.adapter_dir/"adapter_model.safetensors").items():
        layer = int(next(p for p in name.split(".") if p.isdigit()))
        chosen = neurons.neurons_in(layer)
        if is_row(name) and "lora_B" in name: assert torch.equal(t.abs().sum(1).nonzero().flatten(), chosen)
        if is_column(name) and "lora_A" in name: assert torch.equal(t.abs().sum(0).nonzero().flatten(), chosen)


def test_tuning_with_all_neurons_is_pefts_own_lora_step_for_step(tmp_path):
    from peft import LoraConfig, get_peft_model
    data, steps = rows(4), 8
    model = loaded("llama")
    layers, width = view(model).shape
    every = NeuronSet.from_mask(torch.ones(layers, width, dtype=torch.bool))
    rank = 32  # full: the width of the residual stream
    config = TuneConfig(lr=5e-3, max_steps=steps, batch_size=4, rank=rank, warmup=.25, clip=1., seed=3)
    batches = []
    class Keeping(PadCollator):
        def __call__(self, x):
            batches.append(super().__call__(x))
            return batches[-1]
    mine = tune(model, data, every, config, out=tmp_path, data_collator=Keeping(0))

    hf = tiny_model("llama")[0]
    torch.manual_seed(3)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = get_peft_model(hf, LoraConfig(r=rank, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM"))
    params = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=5e-3, betas=(.9, .999), weight_decay=.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: s/2 if s < 2 else (steps - s)/(steps - 2))
    losses = []
    for batch in batches[:steps]: # the rows in the same order: Adam turns the rounding of a gradient near 0 into a whole step
        loss = theirs(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        losses.append(loss.item())
    torch.testing.assert_close(torch.tensor(mine.log["loss"].tolist()), torch.tensor(losses), atol=2e-6, rtol=1e-6)
    assert losses[-1] < losses[0] - .1
    theirs.save_pretrained(tmp_path/"theirs")
    x, y = load_file(mine.adapter_dir/"adapter_model.safetensors"), load_file(tmp_path/"theirs"/"adapter_model.safetensors")
    assert x.keys() == y.keys()
    for k in x: torch.testing.assert_close(x[k], y[k], atol=1e-6, rtol=0)


def test_tuning_with_full_rank_is_training_the_rows_themselves(tmp_path):
    "Against a loop that trains the weights with masked gradients, without any adapter; SGD, since Adam's decay acts on the change."
    model, data = loaded("llama"), rows(4)
    neurons = some(model)
    plain_sgd = dict(lr=.5, max_steps=4, batch_size=4, optimizer="sgd", weight_decay=0, warmup=0, schedule="constant", clip=0)
    tuned = tune(model, data, neurons, TuneConfig(**plain_sgd, full_rank=True, attention=False), out=tmp_path)
    hf = tiny_model("llama")[0]
    ids = torch.tensor([r["input_ids"] for r in data])
    for _ in range(4):
        hf.zero_grad()
        hf(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            for l, layer in enumerate(hf.model.layers):
                n = neurons.neurons_in(l)
                for m in (layer.mlp.gate_proj, layer.mlp.up_proj): m.weight[n] -= .5*m.weight.grad[n]
                layer.mlp.down_proj.weight[:, n] -= .5*layer.mlp.down_proj.weight.grad[:, n]
    got = tuned.merged().state_dict()
    for name, want in hf.state_dict().items(): torch.testing.assert_close(got[name], want, atol=2e-6, rtol=1e-5)


def test_tuning_lowers_the_loss_on_its_text(tmp_path):
    model = loaded("llama")
    texts = {"de": ["der hund und die katze gehen in den wald und schlafen"]*20}
    data = lm_dataset(texts, model.tokenizer, "de", length=24)
    config = TuneConfig(lr=.02, max_steps=30, batch_size=4, attention=False)
    tuned = tune(model, data, some(model, n=8), config, out=tmp_path, eval_dataset=data)
    loss = tuned.log["loss"].dropna()
    assert len(loss) == 30 and loss.iloc[-5:].mean() < loss.iloc[:5].mean() - .2
    assert tuned.log["eval_loss"].dropna().iloc[-1] < loss.iloc[0]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_tuning_a_classifier_learns_and_keeps_the_rest(arch, tmp_path):
    model = loaded(arch)
    data = [dict(input_ids=[7, 8, 9, 10][:1 + i % 4] + [20 + i % 3], labels=i % 3) for i in range(24)]  # the last token tells the class
    config = TuneConfig(lr=.02, epochs=25, batch_size=6, rank=2, clip=1.)
    tuned = check_mask(model, arch, config, tmp_path, data=data, task_type="classification", num_labels=3, eval_dataset=data)
    assert tuned.log["eval_accuracy"].dropna().iloc[-1] == 1
    merged = tuned.merged()
    batch = PadCollator(0)(data[:6])
    labels = batch.pop("labels")
    assert merged(**batch).logits.argmax(-1).tolist() == labels.tolist()
    body = view(tuned.hooked()).hf.base_model(**batch).last_hidden_state
    want = merged.base_model(**batch).last_hidden_state
    torch.testing.assert_close(body, want, atol=1e-3, rtol=1e-3)


def test_tuning_same_seed_same_adapter_other_seed_another(tmp_path):
    model = loaded("gpt2")
    run = lambda name, seed: tune(model, rows(), some(model), TuneConfig(**FAST | dict(seed=seed)), out=tmp_path/name)
    a, b, c = run("a", 0), run("b", 0), run("c", 1)
    same_adapter(a, b)
    with pytest.raises(AssertionError): same_adapter(a, c)


SCRIPT = textwrap.dedent("""
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from test_training import *
    class Killer(PadCollator):
        calls = 0
        def __call__(self, x):
            Killer.calls += 1
            if Killer.calls == 8: os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(x)
    model = loaded("gpt2")
    tune(model, rows(), some(model), TuneConfig(**LONG), out={out!r}, data_collator=Killer(0))
""")
LONG = dict(lr=.02, epochs=4, batch_size=2, rank=2, save_steps=2, clip=1.)


@pytest.mark.slow
def test_tuning_killed_and_resumed_gives_the_same_adapter(tmp_path):
    "GPT-2 has dropout, so the state of the random numbers counts too."
    out = tmp_path/"killed"
    script = SCRIPT.format(tests=os.path.dirname(__file__), out=str(out))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not (out/"adapter").exists()
    kept = sorted(p.name for p in (out/"checkpoints").iterdir())
    assert kept == ["checkpoint-4", "checkpoint-6"]
    (out/"checkpoints"/"checkpoint-8").mkdir()  # as a crash during a save leaves it
    (out/"checkpoints"/"checkpoint-8"/"adapter_model.safetensors").write_bytes(b"cut")
    model, steps = loaded("gpt2"), []
    class Counting(PadCollator):
        def __call__(self, x):
            steps.append(1)
            return super().__call__(x)
    resumed = tune(model, rows(), some(model), TuneConfig(**LONG), out=out, data_collator=Counting(0))
    assert len(steps) < 12 and len(resumed.log["loss"].dropna()) == 12 and not (out/"checkpoints").exists()
    same_adapter(resumed, tune(model, rows(), some(model), TuneConfig(**LONG), out=tmp_path/"calm"))


def test_tuning_full_rank_resumes_with_its_selection_fixed(tmp_path):
    "peft makes every factor trainable when it loads a checkpoint."
    model, calls = loaded("llama"), []
    config = TuneConfig(**LONG | dict(full_rank=True, weight_decay=.5))
    class Failing(PadCollator):
        def __call__(self, x):
            calls.append(1)
            if len(calls) == 8: raise RuntimeError("power cut")
            return super().__call__(x)
    with pytest.raises(RuntimeError, match="power cut"):
        tune(model, rows(), some(model), config, out=tmp_path/"a", data_collator=Failing(0))
    resumed = tune(model, rows(), some(model), config, out=tmp_path/"a")
    same_adapter(resumed, tune(model, rows(), some(model), config, out=tmp_path/"b"))
    weights = load_file(resumed.adapter_dir/"adapter_model.safetensors")
    selection = weights["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
    assert set(selection.unique().tolist()) == {0., 1.} and selection.sum() == 5


def test_tuning_finished_run_returns_at_once_and_refuses_other_settings(tmp_path):
    model = loaded("llama")
    first = tune(model, rows(), some(model), TuneConfig(**FAST), out=tmp_path)
    stamp = (first.adapter_dir/"adapter_model.safetensors").stat().st_mtime_ns
    again = tune(model, rows(), some(model), TuneConfig(**FAST), out=tmp_path)
    assert (again.adapter_dir/"adapter_model.safetensors").stat().st_mtime_ns == stamp
    others = [(dict(lr=.1), rows(), some(model), "lr"), (dict(), rows(seed=1), some(model), "data"),
              (dict(), rows(), some(model, 1), "neurons")]
    for config, data, neurons, word in others:
        with pytest.raises(TuningError, match=f"another {word}"): tune(model, data, neurons, TuneConfig(**FAST | config), out=tmp_path)


def test_tuning_errors_of_the_set(tmp_path):
    model = loaded("llama")
    go = lambda neurons, model=model, **kw: tune(model, rows(), neurons, TuneConfig(**FAST | kw), out=tmp_path)
    with pytest.raises(TuningError, match="empty"): go(NeuronSet([], (2, 64)))
    with pytest.raises(ValueError, match="4 layers"): go(NeuronSet([(0, 1)], (4, 64)))
    with pytest.raises(ValueError, match="fingerprint"): go(NeuronSet([(0, 1)], (2, 64), model="0"*16))
    with pytest.raises(TuningError, match="needs a NeuronSet"): go(None)
    with pytest.raises(TuningError, match="takes no NeuronSet"): go(some(model), mlp="all")
    with pytest.raises(TuningError, match="no rows"): tune(model, [], some(model), TuneConfig(**FAST), out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_tuning_loss_that_explodes_is_reported(tmp_path):
    model = loaded("llama")
    config = TuneConfig(**FAST | dict(lr=1e37, optimizer="sgd", clip=0, weight_decay=0, max_steps=6))
    with pytest.raises(TuningError, match="the loss is nan at step 2"): tune(model, rows(), some(model), config, out=tmp_path)
    assert not (tmp_path/"adapter").exists()


def test_tuning_refuses_a_model_under_intervention(tmp_path):
    from langneuron_mi.change.interventions import ablate
    model = loaded("llama")
    with ablate(some(model)).on(model), pytest.raises(ValueError, match="untouched"):
        tune(model, rows(), some(model), TuneConfig(**FAST), out=tmp_path)
