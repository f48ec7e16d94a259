"Quantised weights: recorded, changed, read and named like any others, against Hugging Face's own quantised model."
import importlib.util
from pathlib import Path

import pytest
import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from langneuron_mi.change.interventions import ablate
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.models.hooked import ModelError
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.quantised import _multiplied, dequantised, packed_layers, quantisation, quantisation_config, steady, stored
from langneuron_mi.models.view import view
from langneuron_mi.recording.record import record
from langneuron_mi.scale.recipes import recipe_of
from langneuron_mi.share.attribution import contribution, effective_score, w_u
from langneuron_mi.testing.tiny import tiny_model
from langneuron_mi.text.sources import load_corpus
from langneuron_mi.text.windows import pack

HOW = ["nf4", "int8", "int4"]
SAYS = dict(nf4="nf4 (bitsandbytes)", int8="int8 (torchao)", int4="int4 (torchao)")
TEXTS = {"en": ["the quick brown fox", "jumps over", "the lazy dog again and again"]*4,
         "de": ["der schnelle braune", "Fuchs springt weit"]*5}
ARCHS = ["llama", "gemma3", "qwen3", "bloom"]
IDS = torch.tensor([[1, 8, 9, 10, 11, 30]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "`folder(arch)` has a tiny model's files; its weights are exact in bf16, as published ones are."
    made = {}
    def make(arch):
        if arch not in made:
            made[arch] = tmp_path_factory.mktemp(arch)
            hf, tok = tiny_model(arch)
            hf.to(torch.bfloat16).save_pretrained(made[arch]), tok.save_pretrained(made[arch])
        return str(made[arch])
    return make


def theirs(path, how):
    "Hugging Face's own quantised model, without this package's or TransformerLens's help."
    config = quantisation_config(how, "cpu", torch.float32)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.float32, attn_implementation="eager").eval()


def out_of(hf, layer):
    mlp = (hf.base_model.h if hasattr(hf.base_model, "h") else hf.base_model.layers)[layer].mlp
    return mlp.down_proj if hasattr(mlp, "down_proj") else mlp.dense_4h_to_h if hasattr(mlp, "dense_4h_to_h") else mlp.c_proj


def what_fires(hf, rows, site):
    "How often each neuron is above 0, by plain hooks, one window at a time."
    got, counts = {}, 0
    if site == "post" or hf.config.model_type == "bloom":
        handles = [out_of(hf, l).register_forward_pre_hook(lambda mod, args, l=l: got.__setitem__(l, args[0])) for l in range(2)]
    else:
        mlps = [layer.mlp for layer in hf.base_model.layers]
        handles = [m.gate_proj.register_forward_hook(lambda mod, args, out, l=l, m=m: got.__setitem__(l, m.act_fn(out)))
                   for l, m in enumerate(mlps)]
    for ids in rows:
        with torch.no_grad(): hf(torch.tensor([ids]))
        counts = counts + torch.stack([(got[l][0, 1:] > 0).sum(0) for l in range(2)])
    for h in handles: h.remove()
    return counts


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("arch", ARCHS)
def test_quantised_counts_equal_brute_force_on_their_own_model(arch, how, folder):
    model, hf = load_model(folder(arch), quantization=how), theirs(folder(arch), how)
    assert torch.allclose(view(model).logits(IDS), hf(IDS).logits, atol=1e-4)
    for site in ("gate", "post"):
        stats = record(model, TEXTS, length=12, site=site, progress=False, seed=0)
        windows = pack(load_corpus(TEXTS), view(model).tokenizer, length=12, seed=0, bos_token_id=1)
        for k, lang in enumerate(stats.langs):
            rows = [[i for i in row if i >= 0] for b in windows.batches(lang, 0, windows.n_windows(lang)) for row in b.tolist()]
            assert sum(len(row) - 1 for row in rows) == stats.n_tokens[lang]
            assert torch.equal(stats.count_pos[k], what_fires(hf, rows, site))
        assert stats.meta["quantised"] == SAYS[how]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("arch", ARCHS)
def test_quantised_ablation_equals_a_hook_written_by_hand(arch, how, folder):
    model, hf = load_model(folder(arch), quantization=how), theirs(folder(arch), how)
    v = view(model)
    neurons = NeuronSet([(0, 3), (0, 17), (1, 40)], v.shape, model=v.fingerprint)
    def off(l):
        def hook(mod, args):
            x = args[0].clone()
            x[..., neurons.neurons_in(l)] = 0
            return (x,)
        return hook
    before = v.logits(IDS)
    handles = [out_of(hf, l).register_forward_pre_hook(off(l)) for l in range(2)]
    want = hf(IDS).logits
    for h in handles: h.remove()
    with ablate(neurons).on(model): got = v.logits(IDS)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (got - before).abs().max() > 1e-2 and torch.equal(v.logits(IDS), before)


@pytest.mark.parametrize("how", HOW)
def test_quantised_weights_are_what_their_layers_multiply_with(how, folder):
    for arch in ARCHS:
        v = view(load_model(folder(arch), quantization=how))
        for name, layer in packed_layers(v.hf).items():
            bias = 0 if layer.bias is None else layer.bias
            want = (layer(torch.eye(layer.in_features)) - bias).T
            torch.testing.assert_close(dequantised(layer), want, atol=1e-5, rtol=1e-5)
            if how != "nf4": assert torch.equal(_multiplied(layer), dequantised(layer))
        assert torch.equal(v.w_out(1), dequantised(out_of(v.hf, 1)).T) and v.w_out(1).shape == (v.d_mlp, v.d_model)


def test_quantised_weights_of_gpt2_lie_as_in_gpt2(folder):
    v, full = view(load_model(folder("gpt2"), quantization="nf4")), view(load_model(folder("gpt2")))
    assert quantisation(v.hf) == SAYS["nf4"] and v.w_out(0).shape == full.w_out(0).shape == (64, 32)
    assert float((v.w_out(0) - full.w_out(0)).abs().max()) < .2*float(full.w_out(0).abs().max())
    for layer in packed_layers(v.hf).values():
        want = layer(torch.eye(layer.in_features)) - layer.bias
        torch.testing.assert_close(dequantised(layer), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", HOW)
def test_quantised_attribution_reads_rows_of_the_output_matrix(how, folder):
    model, hf = load_model(folder("llama"), quantization=how), theirs(folder("llama"), how)
    post = {}
    handles = [out_of(hf, l).register_forward_pre_hook(lambda mod, args, l=l: post.__setitem__(l, args[0][0, -1])) for l in range(2)]
    tok = view(model).tokenizer
    with torch.no_grad(): hf(torch.tensor([tok("the fox").input_ids]))
    for h in handles: h.remove()
    rows = [out_of(hf, l)(torch.eye(64)) for l in range(2)]
    want = torch.stack([post[l].abs()*rows[l].norm(dim=1) for l in range(2)])
    torch.testing.assert_close(contribution(model, "the fox")[0], want, atol=1e-4, rtol=1e-4)
    first = tok("x", add_special_tokens=False).input_ids[0]
    score = torch.stack([post[l]*(rows[l] @ hf.lm_head.weight[first]) for l in range(2)])
    torch.testing.assert_close(effective_score(model, "the fox", "x", lang="zh")[0], score, atol=1e-4, rtol=1e-4)


def test_quantised_unembedding_is_read_too_or_refused(folder):
    v = view(load_model(folder("llama"), quantization_config=TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=[])))
    head, tokens, hidden = packed_layers(v.hf)["lm_head"], torch.tensor([5, 200]), v.hidden(IDS)[0]
    torch.testing.assert_close(w_u(v, tokens), head(torch.eye(32)).T[tokens], atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.cat([x for _, x in v.logit_blocks(hidden)], 1), v.head(hidden)) and v.has_head
    whole = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=[])
    v = view(load_model(folder("llama"), quantization_config=whole)) # TransformerLens's bridge cannot wrap such an unembedding
    assert type(v.model).__name__ == "HookedHF" and "lm_head" in packed_layers(v.hf)
    assert torch.equal(v.logits(IDS), v.hf(IDS).logits)


def test_quantised_identity_is_that_of_the_numbers_not_of_their_packing(folder, tmp_path):
    path = folder("llama")
    views = {how: view(load_model(path, quantization=how)) for how in HOW} | {None: view(load_model(path))}
    assert len({v.fingerprint for v in views.values()}) == 4
    again = view(load_model(path, quantization="nf4"))
    again.logits(IDS)
    assert again.fingerprint == views["nf4"].fingerprint == view(load_model(path, quantization="nf4", dtype=torch.bfloat16)).fingerprint
    assert "quantised" not in views[None].describe() and {h: views[h].describe()["quantised"] for h in HOW} == SAYS
    packed = theirs(path, "nf4")
    packed.save_pretrained(tmp_path), views[None].tokenizer.save_pretrained(tmp_path)
    assert view(load_model(str(tmp_path))).describe() | dict(model_id="") == again.describe() | dict(model_id="")
    assert view(load_model(packed, tokenizer=again.tokenizer)).fingerprint == again.fingerprint


@pytest.mark.parametrize("how", HOW)
def test_quantised_identity_sees_an_edit(how, folder):
    v = view(load_model(folder("llama"), quantization=how))
    before = v.fingerprint
    layer = packed_layers(v.hf)["model.layers.0.mlp.down_proj"]
    stored(layer.weight)[0].view(-1)[:3] ^= 1
    assert v.fingerprint != before
    stored(layer.weight)[0].view(-1)[:3] ^= 1
    assert v.fingerprint == before


def test_quantised_neurons_are_not_those_of_the_full_model(folder):
    full, model = load_model(folder("llama")), load_model(folder("llama"), quantization="nf4")
    neurons = NeuronSet([(0, 3), (1, 5)], (2, 64), model=view(model).fingerprint)
    with pytest.raises(ValueError, match="were found in a model with fingerprint"):
        with ablate(neurons).on(full): pass
    meant = neurons.assume(view(full).fingerprint)
    with ablate(meant).on(full): assert view(full).active
    with pytest.raises(ValueError, match="were found in a model with fingerprint"):
        with ablate(meant).on(model): pass


def test_quantised_weights_that_a_cpu_packed_anew_are_unpacked(tmp_path):
    "What bitsandbytes does at the first forward pass on a CPU with AVX512-BF16, done by hand."
    from bitsandbytes.functional import _convert_weight_packed_for_cpu
    hf, tok = tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    hf.save_pretrained(tmp_path)
    hf = theirs(tmp_path, "nf4")
    layers = packed_layers(hf)
    before = {name: dequantised(layer) for name, layer in layers.items()}
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = True
        layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    v = view(load_model(hf, tokenizer=tok))
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers.values())
    for name, layer in layers.items(): assert float((dequantised(layer) - before[name]).abs().max()) < .02
    kept = v.fingerprint
    v.logits(IDS)
    assert v.fingerprint == kept
    steady(v.hf)
    assert v.fingerprint == kept


def test_quantised_loading_errors_say_what_to_do(folder, monkeypatch, tmp_path):
    path, config = folder("llama"), quantisation_config("nf4", "cpu", torch.float32)
    with pytest.raises(ModelError, match="allowed are 'nf4', 'int8', 'int4'"): load_model(path, quantization="nf5")
    with pytest.raises(ModelError, match="the same thing twice"): load_model(path, quantization="nf4", quantization_config=config)
    hf, tok = tiny_model("llama")
    with pytest.raises(ModelError, match=r"quantization cannot be used with a model object; load it that way"):
        load_model(hf, tokenizer=tok, quantization="nf4")
    with pytest.raises(ModelError, match="TorchAoConfig quantised nothing of GPT2LMHeadModel.*Conv1D"):
        load_model(folder("gpt2"), quantization="int8")
    bloom = load_model(folder("bloom"), quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    assert type(bloom).__name__ == "HookedHF" # TransformerLens's bridge splits a matrix that is packed here
    odd = tiny_model("llama", hidden_size=24, num_attention_heads=3, num_key_value_heads=3)[0]
    odd.save_pretrained(tmp_path), tok.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match='cannot be loaded with TorchAoConfig.*"nf4" takes matrices of any width'):
        load_model(str(tmp_path), quantization="int4")
    assert view(load_model(str(tmp_path), quantization="nf4")).d_model == 24
    real = importlib.util.find_spec
    for how, package in dict(nf4="bitsandbytes", int8="torchao", int4="torchao").items():
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a, gone=package: None if n == gone else real(n, *a))
        with pytest.raises(ModelError, match=rf'needs the package {package}.*pip install "langneuron_mi\[quantised\]"'):
            load_model(path, quantization=how)


@pytest.mark.parametrize("config,said", [
    (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"), "fp4 (bitsandbytes)"),
    (BitsAndBytesConfig(load_in_8bit=True), "int8, activations too (bitsandbytes)"),
    (TorchAoConfig(Int8DynamicActivationInt8WeightConfig()), "int8, activations too (torchao)")], ids=["fp4", "llm.int8", "dynamic"])
def test_quantised_by_a_configuration_of_ones_own(config, said, folder):
    model = load_model(folder("llama"), quantization_config=config)
    v = view(model)
    assert v.describe()["quantised"] == said
    stats, first = record(model, TEXTS, length=64, groups="all", texts=2, progress=False), v.fingerprint
    assert stats.model == first == v.fingerprint and not torch.isnan(stats.impact["en"]).any()
    full = view(load_model(folder("llama")))
    assert float((v.w_out(0) - full.w_out(0)).abs().max()) < .3*float(full.w_out(0).abs().max())


@pytest.mark.parametrize("how", HOW)
def test_quantised_folder_is_loaded_as_it_was_saved_and_in_no_other_form(how, folder, tmp_path):
    theirs(folder("llama"), how).save_pretrained(tmp_path)
    view(load_model(folder("llama"))).tokenizer.save_pretrained(tmp_path)
    v = view(load_model(str(tmp_path)))
    assert v.fingerprint == view(load_model(folder("llama"), quantization=how)).fingerprint
    assert v.describe() == view(load_model(str(tmp_path), quantization=how)).describe()
    for other in set(HOW) - {how}:
        with pytest.raises(ModelError, match="were saved in|The model is quantized with"): load_model(str(tmp_path), quantization=other)


def test_quantised_model_is_loaded_alike_by_a_worker(folder):
    model = load_model(folder("llama"), quantization="nf4")
    recipe = recipe_of(model)
    assert recipe.options["quantization"] == "nf4" and view(recipe.load("cpu")).describe() == view(model).describe()


def test_quantised_script_for_a_gpu_does_the_same_on_a_cpu(tmp_path):
    spec = importlib.util.spec_from_file_location("quantised_gpu", Path(__file__).resolve().parents[2]/"benchmarks/quantised_gpu.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    *rows, again = script.measure(script.saved(str(tmp_path), {}), "cpu")
    assert [r["says"] for r in rows] == [None, *SAYS.values()] and again["fingerprint"] == rows[1]["fingerprint"]
    for r in rows: assert r["same_counts"] and r["ablation_off_by"] == 0 and not r["read_off_by"] and r["tuning"]["moved"] > 1000
