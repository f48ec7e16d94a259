"Memory of tuning: the formula against a dry run on the meta device, and the dry run against real tensors."
import pytest
import torch
from transformers import LlamaConfig, MistralConfig

from langneuron_mi.tuning.neuron_lora import TuneConfig, attach
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.testing.tiny import tiny_model
from langneuron_mi.tuning.memory import LiveBytes, dry_run_memory, meta_model, predict_memory

HEADS = dict(intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
LLAMA_8B = dict(**HEADS, num_hidden_layers=32, hidden_size=4096, vocab_size=128256)
NEMO = dict(**HEADS, num_hidden_layers=40, hidden_size=5120, head_dim=128, vocab_size=131072)


def first(n, shape): return NeuronSet([(l, i) for l in range(shape[0]) for i in range(n)], shape)


def both(make, neurons, config, **kwargs):
    return (predict_memory(make(), neurons, config, **kwargs), dry_run_memory(make(), neurons, config, **kwargs))


@pytest.mark.parametrize("checkpointing", [True, False])
def test_tuning_memory_of_llama_8b_within_15_percent_of_the_dry_run(checkpointing):
    config = TuneConfig(dtype="bfloat16", gradient_checkpointing=checkpointing, batch_size=16)
    said, dry = both(lambda: meta_model(LlamaConfig(**LLAMA_8B)), first(143, (32, 14336)), config)
    assert dry.weights == 2*8_030_261_248
    assert abs(said.total/dry.total - 1) < .15 and abs(said.activations/dry.activations - 1) < .15


def test_tuning_memory_of_a_classifier_within_15_percent_of_the_dry_run():
    config = TuneConfig(dtype="bfloat16", gradient_checkpointing=True, batch_size=4)
    said, dry = both(lambda: meta_model(LlamaConfig(**LLAMA_8B), num_labels=3), first(143, (32, 14336)), config)
    assert abs(dry.weights/2/(8_030_261_248 - 128256*4096) - 1) < 1e-5
    assert abs(said.total/dry.total - 1) < .15 and abs(said.activations/dry.activations - 1) < .15


def test_tuning_memory_of_mistral_nemo_within_15_percent_of_the_dry_run():
    config = TuneConfig(dtype="bfloat16", gradient_checkpointing=True, batch_size=4, rank=64)
    said, dry = both(lambda: meta_model(MistralConfig(**NEMO)), first(143, (40, 14336)), config, length=512)
    assert 24e9 < dry.weights < 25e9
    assert abs(said.total/dry.total - 1) < .15


@pytest.mark.parametrize("extra", [
    dict(), dict(mlp="none"), dict(mlp="all"), dict(full_rank=True), dict(dtype="float32"), dict(optimizer="sgd"),
    dict(optimizer="adafactor"), dict(rank=64)], ids=str)
def test_tuning_memory_of_other_settings(extra):
    config = TuneConfig(**dict(dtype="bfloat16", batch_size=8) | extra)
    neurons = first(143, (2, 14336)) if config.mlp == "neurons" else None
    said, dry = both(lambda: meta_model(LlamaConfig(**LLAMA_8B | dict(num_hidden_layers=2)), config.dtype), neurons, config)
    assert said.adapter == dry.adapter and said.gradients == dry.gradients
    assert abs(said.total/dry.total - 1) < .15 and abs(said.activations/dry.activations - 1) < .15


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_tuning_memory_dry_run_counts_what_real_tensors_take(arch):
    "The same two steps, once on shapes and once on numbers."
    hf = tiny_model(arch)[0]
    config = TuneConfig(batch_size=4, rank=2)
    neurons = NeuronSet([(0, 1), (1, 3)], (2, 64))
    real = dry_run_memory(hf, neurons, config, length=32)
    dry = dry_run_memory(meta_model(tiny_model(arch)[0].config, "float32"), neurons, config, length=32)
    assert real.weights == dry.weights and real.adapter == dry.adapter and real.gradients == dry.gradients
    assert abs(real.total/dry.total - 1) < .03


def test_tuning_memory_live_bytes_follow_tensors():
    with LiveBytes() as live:
        a = torch.empty(1000, device="meta")
        b = a + 1
        c = b.view(10, 100)
        assert live.now == 8000
        del a, b
        assert live.now == 4000
        del c
        assert live.now == 0 and live.peak == 8000


def test_tuning_memory_grows_with_what_it_should():
    hf, neurons = meta_model(LlamaConfig(**LLAMA_8B | dict(num_hidden_layers=2))), first(10, (2, 14336))
    size = lambda **kw: predict_memory(hf, neurons, TuneConfig(**dict(dtype="bfloat16") | kw))
    assert size(batch_size=16).activations == 2*size(batch_size=8).activations
    assert size(gradient_checkpointing=True).activations < size().activations
    assert size(optimizer="sgd").optimizer == 0 and size().optimizer == 2*size().gradients


def test_tuning_memory_attach_on_meta_allocates_nothing():
    model = attach(meta_model(LlamaConfig(**LLAMA_8B | dict(num_hidden_layers=2))), first(3, (2, 14336)), TuneConfig())
    assert all(p.is_meta for p in model.parameters())


def test_tuning_memory_shows_a_table():
    got = predict_memory(meta_model(LlamaConfig(**LLAMA_8B | dict(num_hidden_layers=2))), None, TuneConfig(mlp="none"))
    df = got.to_df()
    assert df.part.tolist() == ["weights", "adapter", "gradients", "optimizer", "activations", "total"]
    assert df.bytes.iloc[-1] == df.bytes.iloc[:-1].sum() == got.total and "| total |" in got._repr_markdown_()
