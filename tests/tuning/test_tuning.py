"Tuning: nothing outside the mask moves, the rest is peft's own LoRA, and a killed run ends like an undisturbed one."
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from langneuron_mi.core.artifacts import ArtifactError
from langneuron_mi.models.view import load_model, view
from langneuron_mi.tuning.neuron_lora import TuneConfig, TuningError, attach, count_parameters, trainable_parameters, wiring
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.testing.tiny import tiny_model
from langneuron_mi.tuning.training import PadCollator, Tuned, classifier, lm_dataset, plain_model, tune
from langneuron_mi.text.windows import pack

ARCHS = ["llama", "mistral", "qwen2", "gemma2", "gemma3", "gpt2", "bloom"]
FAST = dict(lr=.02, max_steps=3, batch_size=2, rank=2, alpha=8, warmup=0, schedule="constant")


def loaded(arch="llama", dtype=torch.float32, **config):
    hf, tok = tiny_model(arch, **config)
    return load_model(hf.to(dtype), tokenizer=tok)


def some(model, seed=0, n=5):
    "n neurons of each layer but the last, which owns none."
    layers, width = view(model).shape
    g = torch.Generator().manual_seed(seed)
    return NeuronSet([(l, int(i)) for l in range(max(layers - 1, 1)) for i in torch.randperm(width, generator=g)[:n]], (layers, width))


def rows(n=6, length=9, top=40, seed=0):
    ids = torch.randint(5, top, (n, length), generator=torch.Generator().manual_seed(seed))
    return [dict(input_ids=r.tolist(), labels=r.tolist()) for r in ids]


def is_row(name): return any(k in name for k in ("gate_proj", "up_proj", "c_fc", "dense_h_to_4h"))
def is_column(name): return any(k in name for k in ("down_proj", "mlp.c_proj", "dense_4h_to_h"))
def is_attention(name): return any(k in name for k in ("q_proj", "k_proj", "v_proj", "o_proj", "attn.c_", "query_key_value", "attention.dense"))


def expected(name, shape, chosen, attention, arch):
    "Where a weight may change, from the names of this architecture alone."
    inside = torch.zeros(shape, dtype=torch.bool)
    if not name.endswith(".weight"): return inside
    if attention and is_attention(name): return ~inside
    layer = int(next((p for p in name.split(".") if p.isdigit()), -1))
    if not (is_row(name) or is_column(name)) or chosen is None: return inside
    if (is_row(name)) != (arch == "gpt2"): inside[chosen[layer]] = True
    else: inside[:, chosen[layer]] = True
    return inside


CONDITIONS = {"own": dict(), "own, no attention": dict(attention=False), "attention only": dict(mlp="none"), "all": dict(mlp="all"),
              "own, full rank": dict(full_rank=True), "own, full rank, no attention": dict(full_rank=True, attention=False)}


def check_mask(model, arch, config, out, **kwargs):
    "Tune, merge, and compare every weight with a second model that nothing was done to."
    neurons = some(model) if config.mlp == "neurons" else None
    tuned = tune(model, kwargs.pop("data", rows()), neurons, config, out=out, **kwargs)
    before = {n: t for n, t in tiny_model(arch)[0].to(view(model).dtype).state_dict().items()}
    after = tuned.merged().state_dict()
    layers, width = view(model).shape
    chosen = None if config.mlp == "none" else [torch.arange(width)]*layers if neurons is None else [neurons.neurons_in(l) for l in range(layers)]
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
    config = TuneConfig(**FAST | CONDITIONS[condition] | dict(optimizer=optimizer, dtype=computed, weight_decay=.5, lr=5. if optimizer == "sgd" else .1))
    tuned = check_mask(loaded("llama", getattr(torch, stored)), "llama", config, tmp_path)
    weights = load_file(tuned.adapter_dir/"adapter_model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}


@pytest.mark.parametrize("extra", [dict(gradient_checkpointing=True), dict(accumulation=3, batch_size=1)], ids=str)
def test_tuning_mask_holds_with_checkpointing_and_accumulation(extra, tmp_path):
    a = check_mask(loaded("gemma3"), "gemma3", TuneConfig(**FAST | extra), tmp_path/"a")
    if "gradient_checkpointing" in extra:
        b = check_mask(loaded("gemma3"), "gemma3", TuneConfig(**FAST), tmp_path/"b")
        same_adapter(a, b, atol=1e-6)


def same_adapter(a, b, atol=0.):
    x, y = (load_file(t.adapter_dir/"adapter_model.safetensors") for t in (a, b))
    assert x.keys() == y.keys() and len(x)
    for k in x: torch.testing.assert_close(x[k], y[k], atol=atol, rtol=0)


@pytest.mark.parametrize("arch", ["llama", "bloom"])
def test_tuning_sees_every_neuron_once_in_the_mask(arch, tmp_path):
    "The masked factors themselves are zero outside, not only their product."
    model = loaded(arch)
    neurons = some(model)
    tuned = tune(model, rows(), neurons, TuneConfig(**FAST | dict(weight_decay=.5)), out=tmp_path)
    for name, t in load_file(tuned.adapter_dir/"adapter_model.safetensors").items():
        layer = int(next(p for p in name.split(".") if p.isdigit()))
        chosen = neurons.neurons_in(layer)
        if is_row(name) and "lora_B" in name: t = t
        elif is_column(name) and "lora_A" in name: t = t.T
        else: continue
        assert torch.equal(t.abs().sum(1).nonzero().flatten(), chosen)


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
    tuned = tune(model, data, neurons, TuneConfig(lr=.5, max_steps=4, batch_size=4, optimizer="sgd", weight_decay=0, warmup=0, schedule="constant", clip=0,
                                                  full_rank=True, attention=False), out=tmp_path)
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


@pytest.mark.parametrize("arch", ARCHS)
def test_tuning_parameter_count_equals_what_is_trainable(arch):
    for extra in CONDITIONS.values():
        config = TuneConfig(**FAST | extra)
        hf = tiny_model(arch)[0]
        w = wiring(hf)
        neurons = NeuronSet([(0, 1), (0, 5), (1, 2)], w.shape) if config.mlp == "neurons" else None
        model = attach(hf, neurons, config)
        held = {id(m.p): m.trainable for m in model.neuron_masks.values()}
        free = sum(held.get(id(p), p.numel()) for p in model.parameters() if p.requires_grad)
        count = count_parameters(hf.config and tiny_model(arch)[0], neurons, config)
        assert free == count.trainable == trainable_parameters(w, neurons, config)
        assert count.allocated == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


def test_tuning_parameter_count_by_hand():
    "Llama: G = 2, d = 32; the numbers of the page's formula, written out."
    w = wiring(tiny_model("llama")[0])
    neurons = NeuronSet([(0, 1), (0, 5), (1, 2)], (2, 64))
    assert trainable_parameters(w, neurons, TuneConfig(rank=2, attention=False)) == 3*2*(32 + 2) + 3*2*(32 + 1)
    assert trainable_parameters(w, neurons, TuneConfig(full_rank=True, attention=False)) == 3*3*32
    attention = 2*2*((32 + 32) + (32 + 16) + (32 + 16) + (32 + 32))
    assert trainable_parameters(w, None, TuneConfig(rank=2, mlp="none")) == attention
    assert count_parameters(w, neurons, TuneConfig(rank=2)).attention == attention


def test_tuning_gradients_of_masked_entries_are_zero_and_nan_cannot_leak():
    hf = tiny_model("llama")[0]
    model = attach(hf, NeuronSet([(0, 1)], (2, 64)), TuneConfig(attention=False, rank=2))
    mask = next(iter(model.neuron_masks.values()))
    poisoned = torch.full_like(mask.p, float("nan"))
    out = mask.apply(poisoned)
    assert out[1].isnan().all() and not out[[0, 2, 3]].any()


def test_tuning_wiring_of_a_fused_gated_mlp():
    "Phi-3 keeps gate and up in one matrix: two rows a neuron."
    import transformers as tf
    hf = tf.AutoModelForCausalLM.from_config(tf.Phi3Config(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                                           num_key_value_heads=2, pad_token_id=0))
    w = wiring(hf)
    assert w.shape == (2, 48) and [m.n_out for m in w.of("in")] == [96, 96]
    model = attach(hf, NeuronSet([(1, 7)], (2, 48)), TuneConfig(attention=False))
    assert model.neuron_masks["model.layers.1.mlp.gate_up_proj"].keep.tolist() == [7, 55]


def test_tuning_wiring_of_opt_and_of_a_mixture_of_experts():
    import transformers as tf
    opt = tf.AutoModelForCausalLM.from_config(tf.OPTConfig(vocab_size=50, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32))
    assert wiring(opt).shape == (2, 48) and len(wiring(opt).of("attention")) == 8
    moe = tf.AutoModelForCausalLM.from_config(tf.MixtralConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                                               num_key_value_heads=2, num_local_experts=2))
    with pytest.raises(TuningError, match="mixtures of experts"): wiring(moe)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("full_rank", [False, True])
def test_tuning_adapter_is_an_ordinary_peft_adapter(arch, full_rank, tmp_path):
    from peft import PeftModel
    model = loaded(arch)
    tuned = tune(model, rows(), some(model), TuneConfig(**FAST | dict(full_rank=full_rank)), out=tmp_path)
    ids = torch.tensor([[1, 6, 7, 8], [1, 9, 10, 11]])
    theirs = PeftModel.from_pretrained(tiny_model(arch)[0], str(tuned.adapter_dir)).eval()(ids).logits
    torch.testing.assert_close(tuned.merged()(ids).logits, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(view(tuned.hooked()).logits(ids), theirs, atol=1e-4, rtol=1e-4)
    assert (theirs - tiny_model(arch)[0](ids).logits).abs().max() > 1e-2
    assert {"adapter_config.json", "adapter_model.safetensors", "neurons.safetensors", "tuning.json", "log.csv"} <= {p.name for p in tuned.adapter_dir.iterdir()}


def test_tuning_lowers_the_loss_on_its_text(tmp_path):
    model = loaded("llama")
    texts = {"de": ["der hund und die katze gehen in den wald und schlafen"]*20}
    data = lm_dataset(texts, model.tokenizer, "de", length=24)
    tuned = tune(model, data, some(model, n=8), TuneConfig(lr=.02, max_steps=30, batch_size=4, attention=False), out=tmp_path, eval_dataset=data)
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
    assert merged(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1).tolist() == batch["labels"].tolist()
    body = view(tuned.hooked()).hf.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    want = merged.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    torch.testing.assert_close(body, want, atol=1e-3, rtol=1e-3)


def test_tuning_classification_reads_the_last_real_token():
    head = classifier(loaded("llama"), 3, pad_token_id=0)
    alone = head(torch.tensor([[1, 7, 8]])).logits
    for padded in ([0, 0, 1, 7, 8], [1, 7, 8, 0, 0]):
        ids = torch.tensor([padded])
        torch.testing.assert_close(head(ids, attention_mask=(ids > 0).long()).logits, alone, atol=1e-5, rtol=1e-5)


def test_tuning_same_seed_same_adapter_other_seed_another(tmp_path):
    model = loaded("gpt2")
    run = lambda name, seed: tune(model, rows(), some(model), TuneConfig(**FAST | dict(seed=seed)), out=tmp_path/name)
    a, b, c = run("a", 0), run("b", 0), run("c", 1)
    same_adapter(a, b)
    with pytest.raises(AssertionError): same_adapter(a, c)


SCRIPT = textwrap.dedent("""
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from test_tuning import *
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
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(tests=os.path.dirname(__file__), out=str(out))], capture_output=True, text=True)
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
    with pytest.raises(RuntimeError, match="power cut"): tune(model, rows(), some(model), config, out=tmp_path/"a", data_collator=Failing(0))
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
    for config, data, neurons, word in [(dict(lr=.1), rows(), some(model), "lr"), (dict(), rows(seed=1), some(model), "data"), (dict(), rows(), some(model, 1), "neurons")]:
        with pytest.raises(TuningError, match=f"another {word}"): tune(model, data, neurons, TuneConfig(**FAST | config), out=tmp_path)


def test_tuning_save_and_load(tmp_path):
    model = loaded("llama")
    tuned = tune(model, rows(), some(model), TuneConfig(**FAST), out=tmp_path/"run")
    copied = Tuned.load(tuned.save(tmp_path/"copy"), model)
    same_adapter(tuned, copied)
    assert copied.neurons == some(model) and copied.config == tuned.config and copied.count == tuned.count
    assert copied.log["loss"].tolist() == tuned.log["loss"].tolist()
    other = loaded("llama", num_key_value_heads=4)
    with pytest.raises(TuningError, match="fingerprint"): Tuned.load(tmp_path/"copy", other)
    with pytest.raises(TuningError, match="exists"): tuned.save(tmp_path/"copy")
    with pytest.raises(ArtifactError, match="no file"): Tuned.load(tmp_path/"nothing", model)


def test_tuning_check_finds_a_change_outside_the_mask(tmp_path):
    from safetensors.torch import save_file
    model = loaded("llama")
    tuned = tune(model, rows(), some(model), TuneConfig(**FAST | dict(attention=False)), out=tmp_path)
    path = tuned.adapter_dir/"adapter_model.safetensors"
    weights = load_file(path)
    name = next(k for k in weights if "down_proj.lora_A" in k)
    outside = next(i for i in range(64) if i not in some(model).neurons_in(0).tolist())
    weights[name][0, outside] = .1
    save_file(weights, path)
    with pytest.raises(TuningError, match="outside the mask"): Tuned.load(tmp_path, model).check()


def test_tuning_lm_dataset_is_the_windows_text(tmp_path):
    model = loaded("llama")
    tok, texts = model.tokenizer, {"en": ["one two three four five six seven"]*4}
    data = lm_dataset(texts, tok, "eng_Latn", tokens=40, length=16)
    assert sum(len(r["input_ids"]) for r in data) == 40 + len(data)
    assert all(r["input_ids"][0] == tok.bos_token_id and r["labels"] == [-100] + r["input_ids"][1:] for r in data)
    from langneuron_mi.text.corpora import load_corpus
    windows = pack(load_corpus(texts), tok, tokens=40, length=16, bos_token_id=tok.bos_token_id)
    assert [r["input_ids"] for r in lm_dataset(windows, tok, "en")] == [r["input_ids"] for r in data]
    assert len(data.seen["en"])


@pytest.mark.parametrize("bad, kwargs, message", [
    (dict(labels=[5, 6, 99999]), {}, "row 1 of the dataset has the label 99999; allowed are 0 to"),
    (dict(labels=[5, -1, 6]), {}, "label -1; allowed"),
    (dict(labels=[5]), {}, "labels of shape"),
    (dict(input_ids=[5, 99999, 6]), {}, "was another tokenizer used"),
    (dict(labels=3), dict(task_type="classification", num_labels=3), "row 1 of the dataset has the label 3; allowed are 0 to 2"),
    (dict(labels=[0, 1]), dict(task_type="classification", num_labels=3), "one class per row"),
    (dict(input_ids=[5, 6], labels=[5, 6]), dict(no_pad=True), "no pad token"),
    (dict(labels=0), dict(task_type="classification", num_labels=3, no_pad=True), "no pad token"),
    (dict(input_ids=[5, 6, 0], labels=0), dict(task_type="classification", num_labels=3), "row 1 of the dataset ends in the pad token 0"),
    (dict(), dict(task_type="classification"), "num_labels"),
    (dict(), dict(task_type="regression"), "no task_type"),
])
def test_tuning_errors_of_the_data(bad, kwargs, message, tmp_path):
    model = loaded("llama")
    if kwargs.pop("no_pad", False): model.tokenizer.pad_token = None
    good = dict(input_ids=[5, 6, 7], labels=0 if kwargs.get("num_labels") else [5, 6, 7])
    with pytest.raises(TuningError, match=message): tune(model, [good, good | bad], some(model), TuneConfig(**FAST), out=tmp_path, **kwargs)
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("options, message", [
    (dict(mlp="some"), "mlp='some'; allowed are"), (dict(rank=0), "rank=0"), (dict(lr=0), "lr=0"), (dict(optimizer="lion"), "optimizer='lion'"),
    (dict(mlp="none", attention=False), "attention=False and mlp='none'"), (dict(mlp="none", full_rank=True), "full_rank=True"),
    (dict(warmup=1), "warmup=1"), (dict(dtype="float16"), "dtype='float16'"), (dict(betas=(.9, 1.)), "betas")])
def test_tuning_config_refuses(options, message):
    with pytest.raises(TuningError, match=message): TuneConfig(**options)


def test_tuning_loss_that_explodes_is_reported(tmp_path):
    model = loaded("llama")
    with pytest.raises(TuningError, match="the loss is nan at step 2"):
        tune(model, rows(), some(model), TuneConfig(**FAST | dict(lr=1e37, optimizer="sgd", clip=0, weight_decay=0, max_steps=6)), out=tmp_path)
    assert not (tmp_path/"adapter").exists()


def test_tuning_without_peft_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TuningError, match=r"langneuron_mi\[tune\]"): attach(tiny_model("llama")[0], None, TuneConfig(mlp="all"))


def test_tuning_refuses_a_model_under_intervention(tmp_path):
    from langneuron_mi.change.interventions import ablate
    model = loaded("llama")
    with ablate(some(model)).on(model), pytest.raises(ValueError, match="untouched"):
        tune(model, rows(), some(model), TuneConfig(**FAST), out=tmp_path)


def test_tuning_plain_model_shares_or_copies_the_weights():
    model = loaded("llama")
    own = dict(tiny_model("llama")[0].named_parameters())
    shared, copied = plain_model(model), plain_model(model, share=False)
    where = {p.data_ptr() for p in view(model).hf.parameters()}
    assert all(p.data_ptr() in where for p in shared.parameters()) and not any(p.data_ptr() in where for p in copied.parameters())
    assert all(torch.equal(p, own[n]) for n, p in shared.named_parameters()) and not any(p.requires_grad for p in shared.parameters())


@pytest.mark.parametrize("arch", ARCHS)
def test_tuning_classifier_of_every_architecture_has_the_body_and_a_new_head(arch):
    model = loaded(arch)
    head, again, other = (classifier(model, 4, pad_token_id=0, seed=s) for s in (0, 0, 1))
    ids = torch.tensor([[1, 7, 8, 9], [1, 7, 8, 0]])
    got = head(ids, attention_mask=(ids > 0).long()).logits
    assert got.shape == (2, 4) and torch.equal(got, again(ids, attention_mask=(ids > 0).long()).logits)
    assert not torch.allclose(got, other(ids, attention_mask=(ids > 0).long()).logits)
    hidden = tiny_model(arch)[0].base_model(ids[1:, :3]).last_hidden_state[0, -1]
    torch.testing.assert_close(got[1], head.score.weight @ hidden, atol=1e-4, rtol=1e-4)
