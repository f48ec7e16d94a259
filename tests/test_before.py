"What the version before the floors wrote (commit feec7e7): it is read, and the same calls give the same bits."
import hashlib
import json
from pathlib import Path

import pytest
import torch

from langneuron_mi import (
    ActivationStats,
    LanguageNeurons,
    PerplexityMatrix,
    lape,
    load_corpus,
    load_model,
    perplexity_matrix,
    planted_model,
)
from langneuron_mi import random_neurons, record
from langneuron_mi.share.effect import CategoryEffect

BEFORE = Path(__file__).parent/"data"/"before"
PRINTS = json.loads((BEFORE/"prints.json").read_text())


def prints(path) -> dict[str, str]:
    "A hash of the bytes of every tensor in a file."
    from safetensors.torch import load_file
    return {k: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()[:16] for k, t in sorted(load_file(path).items())}


@pytest.fixture(scope="module")
def parts():
    "The model and the texts with which the files were written."
    planted = planted_model(["en", "de", "fr"])
    train, held = load_corpus(planted.texts(60, seed=0)).split(0.3, seed=0)
    return load_model(planted.hf, tokenizer=planted.tokenizer), train, held


def test_before_files_are_read():
    stats, neurons = ActivationStats.load(BEFORE/"stats.safetensors"), LanguageNeurons.load(BEFORE/"neurons.safetensors")
    assert stats.langs == tuple(neurons) and stats.n_tokens == dict.fromkeys(stats.langs, 300)
    assert len(PerplexityMatrix.load(BEFORE/"perplexity.safetensors").to_df()) == 21
    assert CategoryEffect.load(BEFORE/"effect.safetensors").langs
    for name in ("stats", "neurons", "perplexity", "effect"): assert prints(BEFORE/f"{name}.safetensors") == PRINTS[f"{name}.safetensors"]


def test_before_and_now_give_the_same_bits(parts, tmp_path):
    model, train, held = parts
    torch.set_num_threads(1)
    args = dict(tokens=300, length=32, batch_size=2, shard_size=2, progress=False)
    stats = record(model, train, groups="all", texts=4, out=tmp_path/"recording", **args)
    record(model, train, groups="counts", **args).save(tmp_path/"stats.safetensors")
    neurons = lape(stats)
    neurons.save(tmp_path/"neurons.safetensors")
    matrix = perplexity_matrix(model, held, [neurons, random_neurons(stats, like=neurons)], tokens=100, progress=False)
    matrix.save(tmp_path/"perplexity.safetensors")
    exact = ("recording/stats.safetensors", "stats.safetensors", "neurons.safetensors")
    for name in exact: assert prints(tmp_path/name) == PRINTS[name], name
    old = PerplexityMatrix.load(BEFORE/"perplexity.safetensors")
    assert old.nll.keys() == matrix.nll.keys() and all(abs(old.nll[k] - x).max() < 1e-4 for k, x in matrix.nll.items())
