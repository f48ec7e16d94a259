"Neuron-level LoRA: which numbers can change, and how many they are."
import sys

import pytest
import torch

from adapters import ARCHS, CONDITIONS, FAST
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.testing.tiny import tiny_model
from langneuron_mi.tuning.neuron_lora import TuneConfig, TuningError, attach, count_parameters, trainable_parameters, wiring


SIZES = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)


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
    hf = tf.AutoModelForCausalLM.from_config(tf.Phi3Config(**SIZES, intermediate_size=48, num_key_value_heads=2, pad_token_id=0))
    w = wiring(hf)
    assert w.shape == (2, 48) and [m.n_out for m in w.of("in")] == [96, 96]
    model = attach(hf, NeuronSet([(1, 7)], (2, 48)), TuneConfig(attention=False))
    assert model.neuron_masks["model.layers.1.mlp.gate_up_proj"].keep.tolist() == [7, 55]


def test_tuning_wiring_of_opt_and_of_a_mixture_of_experts():
    import transformers as tf
    opt = tf.AutoModelForCausalLM.from_config(tf.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32))
    assert wiring(opt).shape == (2, 48) and len(wiring(opt).of("attention")) == 8
    experts = tf.MixtralConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, num_local_experts=2)
    moe = tf.AutoModelForCausalLM.from_config(experts)
    with pytest.raises(TuningError, match="one dense MLP .* has Layout.*2 experts"): wiring(moe)


@pytest.mark.parametrize("options, message", [
    (dict(mlp="some"), "mlp='some'; allowed are"), (dict(rank=0), "rank=0"), (dict(lr=0), "lr=0"),
    (dict(optimizer="lion"), "optimizer='lion'"),
    (dict(mlp="none", attention=False), "attention=False and mlp='none'"), (dict(mlp="none", full_rank=True), "full_rank=True"),
    (dict(warmup=1), "warmup=1"), (dict(dtype="float16"), "dtype='float16'"), (dict(betas=(.9, 1.)), "betas")])
def test_tuning_config_refuses(options, message):
    with pytest.raises(TuningError, match=message): TuneConfig(**options)


def test_tuning_without_peft_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TuningError, match=r"langneuron_mi\[tune\]"): attach(tiny_model("llama")[0], None, TuneConfig(mlp="all"))
