"Tuning on quantised weights (QLoRA on chosen neurons): the base stays packed and as it was, only chosen neurons move."
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapters import FAST, expected, rows, some
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.quantised import dequantised, packed_layers, quantisation, quantisation_config, stored
from langneuron_mi.models.view import view
from langneuron_mi.testing.tiny import tiny_model
from langneuron_mi.tuning.memory import dry_run_memory, predict_memory
from langneuron_mi.tuning.neuron_lora import TuneConfig, TuningError, attach
from langneuron_mi.tuning.plain import classifier, plain_model
from langneuron_mi.tuning.training import tune
from langneuron_mi.tuning.tuned import Tuned

HOW = ["nf4", "int8", "int4"]
IDS = torch.tensor([[1, 6, 7, 8], [1, 9, 10, 11]])


def saved(path, arch="llama", **config):
    hf, tok = tiny_model(arch, **config)
    hf.save_pretrained(path), tok.save_pretrained(path)
    return str(path)


SETTINGS = [dict(), dict(attention=False), dict(full_rank=True), dict(dtype="bfloat16"), dict(gradient_checkpointing=True)]


@pytest.mark.parametrize("how,arch,extra", [
    *(("nf4", "llama", s) for s in SETTINGS), *((h, "llama", s) for h in ("int8", "int4") for s in SETTINGS[1:4]),
    *(("nf4", a, dict()) for a in ("gpt2", "bloom", "gemma3"))], ids=str)
def test_quantised_tuning_changes_nothing_outside_the_mask(how, arch, extra, tmp_path):
    model = load_model(saved(tmp_path/"model", arch), quantization=how)
    v, neurons = view(model), some(model)
    before, logits = plain_model(model, share=False).state_dict(), v.logits(IDS)
    packed = {name: [t.clone() for t in stored(layer.weight)] for name, layer in packed_layers(v.hf).items()}
    config = TuneConfig(**FAST | extra)
    tuned = tune(model, rows(), neurons, config, out=tmp_path/"run")
    after = tuned.merged()
    assert quantisation(after) is None and len(tuned.check()) and torch.equal(v.logits(IDS), logits)
    for name, layer in packed_layers(v.hf).items():
        assert all(torch.equal(a, b) for a, b in zip(stored(layer.weight), packed[name]))
    chosen = [neurons.neurons_in(l) for l in range(2)]
    for name, new in after.state_dict().items():
        inside, d = expected(name, new.shape, chosen, config.attention, arch), new - before[name]
        assert not d[~inside].any(), name
        assert not inside.any() or d[inside].any(), name


@pytest.mark.parametrize("how", HOW)
def test_quantised_training_step_moves_only_chosen_neurons(how, tmp_path):
    "On the packed weights themselves, nothing merged: what gate and up say of neurons of layer 0, before and after one step."
    model = load_model(saved(tmp_path), quantization=how)
    neurons = NeuronSet([(0, 3), (0, 50)], (2, 64))
    peft = attach(plain_model(model), neurons, TuneConfig(rank=2, attention=False)).train()
    assert quantisation(peft) == quantisation(view(model).hf)
    learned = [p for p in peft.parameters() if p.requires_grad]
    assert {p.dtype for p in learned} == {torch.float32} and sum(p.numel() for p in learned) == 3*2*(32 + 64)
    mlp, got = peft.base_model.model.model.layers[0].mlp, {}
    for name in ("gate_proj", "up_proj"): getattr(mlp, name).register_forward_hook(lambda mod, args, out, n=name: got.__setitem__(n, out))
    said = []
    for _ in range(3):
        peft(input_ids=IDS, labels=IDS).loss.backward()
        torch.optim.SGD(learned, lr=.5).step()
        peft.zero_grad()
        said.append({k: x.detach().clone() for k, x in got.items()})
    for k in got:
        moved = (said[2][k] != said[0][k]).any((0, 1))
        assert moved.nonzero().flatten().tolist() == [3, 50], k


@pytest.mark.parametrize("how", HOW)
def test_quantised_adapter_fits_their_own_quantised_model(how, tmp_path):
    path = saved(tmp_path/"model")
    model = load_model(path, quantization=how)
    tuned = tune(model, rows(), some(model), TuneConfig(**FAST), out=tmp_path/"run")
    config = quantisation_config(how, "cpu", torch.float32)
    hf = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.float32)
    untouched = hf(IDS).logits
    theirs = PeftModel.from_pretrained(hf, str(tuned.adapter_dir)).eval()(IDS).logits
    torch.testing.assert_close(tuned.merged()(IDS).logits, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(view(tuned.hooked()).logits(IDS), theirs, atol=1e-4, rtol=1e-4)
    assert (theirs - untouched).abs().max() > 1e-2
    assert "quantised" not in view(tuned.hooked()).describe() and tuned.provenance["quantised"].startswith(how)
    with pytest.raises(TuningError, match="load that model"): Tuned.load(tmp_path/"run", load_model(path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_plain_model_shares_what_is_packed_or_has_it_in_full(dtype, tmp_path):
    model = load_model(saved(tmp_path, "opt", ffn_dim=128), quantization="nf4")
    v = view(model)
    biases = {n: p.dtype for n, p in v.hf.named_parameters() if n.endswith("bias")}
    shared, full = plain_model(model, dtype=getattr(torch, dtype)), plain_model(model, share=False)
    theirs, mine = packed_layers(v.hf), packed_layers(shared)
    assert len(mine) == 12 and not packed_layers(full)
    for name, layer in mine.items():
        assert layer is not theirs[name] and layer.weight.data_ptr() == theirs[name].weight.data_ptr()
        assert layer.compute_dtype == getattr(torch, dtype)
        assert torch.equal(full.get_submodule(name).weight, dequantised(theirs[name]))
    torch.testing.assert_close(full(IDS).logits, v.logits(IDS), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shared(IDS).logits.float(), v.logits(IDS), **({} if dtype == "float32" else dict(atol=.5, rtol=.1)))
    assert biases == {n: p.dtype for n, p in v.hf.named_parameters() if n.endswith("bias")}  # bitsandbytes casts them in place


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_quantised_classifier_is_tuned_on_the_packed_body(how, tmp_path):
    model = load_model(saved(tmp_path/"model"), quantization=how)
    head = classifier(model, 3, pad_token_id=0)
    assert len(packed_layers(head)) == 14 and head.score.weight.dtype == torch.float32
    data = [r | dict(labels=i % 3) for i, r in enumerate(rows())]
    tuned = tune(model, data, some(model), TuneConfig(**FAST), out=tmp_path/"run", task_type="classification", num_labels=3)
    assert len(tuned.check()) and tuned.merged().score.weight.shape == (3, 32) and view(tuned.hooked()).shape == view(model).shape


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("how", HOW)
def test_quantised_memory_within_15_percent_of_two_real_steps(how, checkpointing, tmp_path):
    size = dict(hidden_size=256, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=4, head_dim=32, num_hidden_layers=4)
    model = load_model(saved(tmp_path, **size), quantization=how)
    neurons = NeuronSet([(0, 1), (1, 3), (3, 7)], (4, 1024))
    config = TuneConfig(batch_size=2, rank=2, gradient_checkpointing=checkpointing)
    said = predict_memory(plain_model(model), neurons, config, length=32)
    real = dry_run_memory(plain_model(model), neurons, config, length=32)
    full = predict_memory(plain_model(model, share=False), neurons, config, length=32)
    assert abs(said.weights/real.weights - 1) < .01 and abs(said.total/real.total - 1) < .15
    assert said.weights < full.weights/3
    if not checkpointing: assert (said.total < full.total) == (how == "nf4")  # torchao's stay unpacked in the graph
