"What the tests of tuning share: small models, sets and rows, and the mask told from the names of weights alone."
import torch
from safetensors.torch import load_file

from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.testing.tiny import tiny_model


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
def is_attention(name):
    return any(k in name for k in ("q_proj", "k_proj", "v_proj", "o_proj", "attn.c_", "query_key_value", "attention.dense"))


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


def same_adapter(a, b, atol=0.):
    x, y = (load_file(t.adapter_dir/"adapter_model.safetensors") for t in (a, b))
    assert x.keys() == y.keys() and len(x)
    for k in x: torch.testing.assert_close(x[k], y[k], atol=atol, rtol=0)
