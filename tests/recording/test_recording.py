"Recording: against brute force on the Hugging Face model, and under kills, bad input and full disks."
import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lens import lens_models

from langneuron_mi.core.atomic import ArtifactError
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.recording.stats import ActivationStats
from langneuron_mi.recording.passes import RecordingError
from langneuron_mi.recording.recorder import Recorder, shards
from langneuron_mi.recording.tokens import cache_activations
from langneuron_mi.recording.record import record
from langneuron_mi.testing.planted import planted_model
from langneuron_mi.testing.tiny import tiny_model
from langneuron_mi.text.windows import pack
from langneuron_mi.text.sources import load_corpus

ARCHS = ["llama", "mistral", "qwen2", "gemma2", "gemma3", "bloom", "gpt2"]
TEXTS = {"en": ["the quick brown fox", "jumps over", "the lazy dog again and again"] * 4,
         "de": ["der schnelle braune", "Fuchs springt weit"] * 5}


def mlps(hf):
    base = hf.base_model
    layers = base.h if hasattr(base, "h") else base.layers
    return [layer.mlp for layer in layers]


def brute_force(hf, tok, bos, length, texts, site):
    "Counts, sums and token numbers, from plain PyTorch hooks on the Hugging Face modules, one window at a time."
    got = {}
    def keep(key):
        return lambda mod, inp, out=None: got.__setitem__(key, inp[0] if out is None else out)
    handles = []
    for l, mlp in enumerate(mlps(hf)):
        if hasattr(mlp, "gate_proj"):
            handles += [mlp.gate_proj.register_forward_hook(keep(("gate", l))), mlp.down_proj.register_forward_pre_hook(keep(("post", l)))]
        else:
            down = mlp.dense_4h_to_h if hasattr(mlp, "dense_4h_to_h") else mlp.c_proj
            handles.append(down.register_forward_pre_hook(keep(("post", l))))
    counts, sums, maxs, n = {}, {}, {}, {}
    for lang, lines in texts.items():
        stream = [t for line in lines for t in tok(line + "\n", add_special_tokens=False).input_ids]
        step = length - (bos is not None)
        c = s = m = 0
        for i in range(0, len(stream), step):
            ids = ([bos] if bos is not None else []) + stream[i:i + step]
            with torch.no_grad():
                hf(torch.tensor([ids]))
            rows = []
            for l, mlp in enumerate(mlps(hf)):
                a = mlp.act_fn(got["gate", l]) if site == "gate" and ("gate", l) in got else got["post", l]
                a = a.reshape(-1, a.shape[-1])[len(ids) - len(stream[i:i + step]):]
                rows.append((torch.tensor((a > 0).sum(0).tolist()), a.double().sum(0), a.double().max(0).values))
            c = c + torch.stack([r[0] for r in rows])
            s = s + torch.stack([r[1] for r in rows])
            mx = torch.stack([r[2] for r in rows])
            m = mx if isinstance(m, int) else torch.maximum(m, mx)
        counts[lang], sums[lang], maxs[lang], n[lang] = c, s, m, len(stream)
    for h in handles:
        h.remove()
    return counts, sums, maxs, n


@pytest.mark.parametrize("site", ["gate", "post"])
@pytest.mark.parametrize("arch", ARCHS)
def test_recording_equals_brute_force(arch, site):
    for name, hf, tok, model in lens_models(arch):
        v = view(model)
        corpus = load_corpus({k: list(x) for k, x in TEXTS.items()})
        stats = record(model, corpus, length=12, batch_size=3, shard_size=4, site=site, progress=False, seed=0)
        texts = ordered(corpus, tok, v, 12)
        counts, sums, maxs, n = brute_force(hf, tok, v.bos_token_id, 12, texts, site)
        assert stats.n_tokens == n, name
        for k, lang in enumerate(stats.langs):
            assert torch.equal(stats.count_pos[k], counts[lang]), (name, lang)
            torch.testing.assert_close(stats.moments["sum"][k], sums[lang], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(stats.moments["max"][k], maxs[lang], atol=1e-4, rtol=1e-4)


def ordered(corpus, tok, v, length):
    "The texts in the order in which they were packed: read back from the windows."
    w = pack(corpus, tok, length=length, seed=0, bos_token_id=v.bos_token_id)
    out = {}
    for lang in w.langs:
        ids = [t for b in w.batches(lang, 0, w.n_windows(lang)) for r in b.tolist() for t in r[int(v.bos_token_id is not None):]]
        text = tok.decode(ids)
        out[lang] = [t for t in text.split("\n") if t]
        assert sorted(x.strip() for x in out[lang]) == sorted(x.strip() for x in corpus.texts(lang))
    return out


def test_recording_batching_and_sharding_do_not_change_counts():
    hf, tok = tiny_model("gemma3")
    model = load_model(hf, tokenizer=tok)
    a = record(model, TEXTS, length=16, batch_size=1, shard_size=1, progress=False)
    b = record(model, TEXTS, length=16, batch_size=8, shard_size=64, progress=False)
    assert torch.equal(a.count_pos, b.count_pos) and a.n_tokens == b.n_tokens
    torch.testing.assert_close(a.moments["sum"], b.moments["sum"])


def test_recording_counts_exact_in_bf16():
    hf, tok = tiny_model("llama")
    model = load_model(hf.to(torch.bfloat16), tokenizer=tok)
    stats = record(model, TEXTS, length=16, progress=False)
    got = []
    v = view(model)
    w = pack(load_corpus(TEXTS), tok, length=16, seed=0, bos_token_id=v.bos_token_id)
    with v.hooks([(1, "pre", lambda x: got.append((x[:, 1:] > 0).sum((0, 1)).tolist()))]):
        for i in range(0, w.n_windows("en"), 8):
            for ids in w.batches("en", i, min(i + 8, w.n_windows("en"))):
                v.body(ids)
    assert torch.equal(stats.count_pos[0, 1], torch.tensor(got).sum(0))
    assert stats.moments["sum"].dtype == torch.float64


def test_recording_float64_sums_do_not_stall():
    "methods 9.5: a 16-bit running sum stops growing after a few thousand tokens."
    from langneuron_mi.recording.groups import groups
    from langneuron_mi.recording.groups import Layer, Seen
    g = groups["moments"]
    state, x = g.init(Layer(1)), torch.full((5000, 1), 1.0, dtype=torch.bfloat16)
    for _ in range(4):
        g.update(state, Seen(x))
    assert state["sum"].item() == 20000 and state["sumsq"].item() == 20000


def test_recording_gate_and_post_differ_in_a_gated_model():
    "methods 1: the sign of the product selects other neurons."
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    gate, post = (record(model, TEXTS, site=s, length=16, progress=False) for s in ("gate", "post"))
    assert not torch.equal(gate.count_pos, post.count_pos)
    with pytest.raises(ValueError, match="site"):
        gate + post


def test_recording_addition_of_halves_equals_the_whole():
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    en, de = ({l: TEXTS[l]} for l in ("en", "de"))
    a, b, both = (record(model, t, length=16, progress=False) for t in (en, de, TEXTS))
    assert torch.equal((a + b).count_pos, both.count_pos) and (a + b).n_tokens == both.n_tokens
    other = record(load_model(tiny_model("llama", seed=5)[0], tokenizer=tok), en, length=16, progress=False)
    with pytest.raises(ValueError, match="model differs"):
        a + other


def test_recording_nan_names_the_layer():
    hf, tok = tiny_model("llama")
    with torch.no_grad():
        hf.model.layers[1].mlp.gate_proj.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="layer 1 .*NaN or infinite"):
        load_model(hf, tokenizer=tok)
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)  # sound when loaded, broken on one word of the text
    with torch.no_grad():
        view(model).hf.model.embed_tokens.weight[tok("q", add_special_tokens=False).input_ids[0]] = float("nan")
    with pytest.raises(RecordingError, match="layer 0 .*NaN or infinite.*en"):
        record(model, TEXTS, length=16, progress=False)


def test_recording_hook_that_does_not_fire_is_an_error():
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    v = view(model)
    real = v.body
    v.body = lambda ids, *a: real(ids[:, :-1])  # one token per row is never run
    try:
        with pytest.raises(RecordingError, match="of .* tokens"):
            record(model, TEXTS, length=16, progress=False)
    finally:
        del v.body


def test_recording_too_little_text_and_unknown_language():
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    with pytest.raises(ValueError, match="de.*asked|asked.*de"):
        record(model, TEXTS, tokens=10_000, langs=["de"], progress=False)
    with pytest.raises((ValueError, KeyError), match="ger"):
        record(model, TEXTS, langs=["ger"], progress=False)


def test_recording_other_configuration_in_the_same_folder(tmp_path):
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    a = record(model, TEXTS, length=16, out=tmp_path, progress=False)
    again = record(model, TEXTS, length=16, out=tmp_path, progress=False)
    assert torch.equal(a.count_pos, again.count_pos) and torch.equal(a.moments["sum"], again.moments["sum"])
    for change in (dict(length=32), dict(seed=1), dict(site="post"), dict(tokens=50)):
        with pytest.raises(ArtifactError, match="another recording"):
            record(model, TEXTS, **dict(length=16, out=tmp_path, progress=False) | change)
    changed = {k: v + ["more"] for k, v in TEXTS.items()}
    with pytest.raises(ArtifactError, match="corpus"):
        record(model, changed, length=16, out=tmp_path, progress=False)


def test_recording_full_disk_then_continues(tmp_path, monkeypatch):
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    args = dict(length=16, shard_size=2, out=tmp_path / "a", checkpoint_every=0., progress=False)
    real, calls = os.replace, []
    def full(*a, **k):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*a, **k)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ArtifactError, match="space"):
        record(model, TEXTS, **args)
    monkeypatch.setattr(os, "replace", real)
    runs = []
    run = Recorder.run
    monkeypatch.setattr(Recorder, "run", lambda self, w, s, tick: runs.append(s.number) or run(self, w, s, tick))
    record(model, TEXTS, **args)
    assert 0 not in runs, "the first shards were kept"
    record(model, TEXTS, **args | dict(out=tmp_path / "b"))
    assert (tmp_path / "a/stats.safetensors").read_bytes() == (tmp_path / "b/stats.safetensors").read_bytes()
    assert not list((tmp_path / "a").glob("*tmp*"))


SCRIPT = """
import sys, time, torch, warnings; warnings.filterwarnings("ignore")
torch.set_num_threads(1)
from langneuron_mi.testing.tiny import tiny_model
from langneuron_mi.models.loading import load_model
from langneuron_mi.recording.recorder import Recorder
from langneuron_mi.recording.record import record
hf, tok = tiny_model("gemma3")
run = Recorder.run
Recorder.run = lambda self, w, s, tick: (time.sleep(.1), print("shard", flush=True), run(self, w, s, tick))[2]
print("start", flush=True)
texts = {l: [f"{l} word{i} and word{i*7%13}" for i in range(120)] for l in ("en", "de", "fr")}
record(load_model(hf, tokenizer=tok), texts, length=32, shard_size=4, batch_size=2, out=sys.argv[1], checkpoint_every=0., progress=False)
"""


@pytest.mark.slow
def test_recording_killed_five_times_gives_the_same_bytes(tmp_path):
    "SIGKILL at five random moments, then to the end: the same bytes as an undisturbed run."
    env = os.environ | dict(HF_HUB_OFFLINE="1")
    def start(out):
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env,
                                text=True)
    clean = start(tmp_path / "clean")
    everything = clean.communicate()[0].count("shard")
    assert clean.returncode == 0 and everything > 10
    rng, killed = random.Random(0), 0
    for i in range(5):
        p = start(tmp_path / "killed")
        p.stdout.readline()
        time.sleep(rng.uniform(.05, 1.))
        while i == 4 and p.poll() is None and not list((tmp_path / "killed").glob("part-*")):
            time.sleep(.02)  # at least one kill falls after a checkpoint
        if p.poll() is None:
            p.send_signal(signal.SIGKILL)
            killed += 1
        p.wait()
    final = start(tmp_path / "killed")
    last = final.communicate()[0].count("shard")
    assert final.returncode == 0 and killed == 5
    assert last < everything, "the last run went on from a checkpoint"
    files = lambda d: {f.name: f.read_bytes() for f in d.iterdir() if f.suffix == ".safetensors"}
    assert files(tmp_path / "killed") == files(tmp_path / "clean")


def test_recording_save_load_round_trip(tmp_path):
    hf, tok = tiny_model("bloom")
    stats = record(load_model(hf, tokenizer=tok), TEXTS, length=16, progress=False)
    back = ActivationStats.load(stats.save(tmp_path / "s.safetensors"))
    assert torch.equal(back.count_pos, stats.count_pos) and back.n_tokens == stats.n_tokens and back.meta == stats.meta
    assert all(np.array_equal(back.seen[l], stats.seen[l]) for l in stats.langs)


def test_recording_planted_rates():
    p = planted_model()
    stats = record(load_model(p.hf, tokenizer=p.tokenizer), p.texts(40, seed=2), progress=False)
    for k, lang in enumerate(stats.langs):
        for layer, neuron in p.neurons[lang]:
            assert stats.count_pos[:, layer, neuron].tolist() == [stats.n_tokens[l] if l == lang else 0 for l in stats.langs]


@pytest.mark.parametrize("arch", ["gemma2", "bloom", "llama"])
def test_recording_cache_activations_equals_counts(arch):
    for _, hf, tok, model in lens_models(arch):
        prompt, v = "abc def", view(model)
        acts = cache_activations(model, prompt, layers=[0, 1])
        stats = record(model, load_corpus({"en": [prompt]}, sep=""), progress=False)
        skip = int(v.bos_token_id is not None)
        assert stats.n_tokens["en"] == len(acts.tokens[0]) - skip
        assert torch.equal((acts.values[0][skip:] > 0).sum(0), stats.count_pos[0].flatten())
        torch.testing.assert_close(acts.values[0][skip:].double().sum(0), stats.moments["sum"][0].flatten(), atol=1e-4, rtol=1e-4)
        post = NeuronSet([(0, 1)], shape=v.shape, site="post")
        with pytest.raises(ValueError, match="site='post'"):
            cache_activations(model, prompt, neurons=post)
        both = cache_activations(model, prompt, neurons=[(1, 5), (0, 3)])
        torch.testing.assert_close(both.of(1, 5), acts.of(1, 5))
        assert len(acts.to_df()) == len(acts.tokens[0]) * v.n_layers * v.d_mlp


def test_recording_groups_and_counts_are_checked():
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    for bad in (("counts", "counts"), ("moments",), ("counts", "no_such")):
        with pytest.raises(ValueError, match="group"):
            record(model, TEXTS, groups=bad, progress=False)
    with pytest.raises(ValueError, match="rates, not counts"):
        ActivationStats.from_counts(torch.rand(1, 2, 3), [10], ["en"])
    with pytest.raises(ValueError, match="between 0 and"):
        ActivationStats.from_counts(torch.full((1, 2, 3), 11), [10], ["en"])


def test_recording_interrupted_before_the_first_shard_promises_nothing(tmp_path, monkeypatch):
    hf, tok = tiny_model("llama")
    def stop(self, w, s, tick): raise KeyboardInterrupt
    monkeypatch.setattr(Recorder, "run", stop)
    with pytest.raises(KeyboardInterrupt, match="no shard of 2 windows was finished"):
        record(load_model(hf, tokenizer=tok), TEXTS, out=tmp_path / "a", length=16, shard_size=2, progress=False)


@pytest.mark.parametrize("size", ["batch_size", "shard_size"])
def test_recording_sizes_are_at_least_one(size):
    hf, tok = tiny_model("llama")
    with pytest.raises(ValueError, match=f"{size}=0: give 1 or more windows"):
        record(load_model(hf, tokenizer=tok), TEXTS, progress=False, **{size: 0})


def test_recording_interrupted_keeps_what_is_done(tmp_path, monkeypatch):
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    args = dict(length=16, shard_size=2, progress=False)
    run, done = Recorder.run, []
    def stop(self, w, s, tick):
        if len(done) == 3: raise KeyboardInterrupt
        done.append(s.number)
        return run(self, w, s, tick)
    monkeypatch.setattr(Recorder, "run", stop)
    with pytest.raises(KeyboardInterrupt, match="same call again"):
        record(model, TEXTS, out=tmp_path / "a", **args)
    again = []
    monkeypatch.setattr(Recorder, "run", lambda self, w, s, tick: again.append(s.number) or run(self, w, s, tick))
    record(model, TEXTS, out=tmp_path / "a", **args)
    assert again[0] == 3


def test_recording_unwritable_folder_fails_before_the_work(tmp_path, monkeypatch):
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(Recorder, "run", lambda *a: pytest.fail("worked before it knew where to write"))
    with pytest.raises(ArtifactError, match="cannot write"):
        record(model, TEXTS, out=tmp_path / "file" / "run", progress=False)


def test_recording_training_mode_is_refused():
    hf, tok = tiny_model("gpt2")
    model = load_model(hf, tokenizer=tok)
    view(model).hf.train()
    with pytest.raises(ValueError, match="eval"):
        record(model, TEXTS, progress=False)
