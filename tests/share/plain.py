"Parallel prompts, and their categories from every activation of every prompt, read with plain PyTorch hooks on the Hugging Face model."
from functools import cache

import torch
from hypothesis import strategies as st

from langneuron_mi.models.loading import load_model
from langneuron_mi.testing.tiny import tiny_model

ARCHS = ["llama", "mistral", "qwen2", "gemma2", "gemma3", "bloom", "gpt2"]
PROMPTS = {"en": ["abc de", "f", "ghij klm nop", "q r s", "tuv"], "de": ["zyx", "wv uts rq", "p", "onm l k", "ji"],
           "zh": ["中", "文字", "我们x", "y你好", "zz"]}
ANSWERS = {"en": ["b", "cd", "e", "f g", "h"], "de": ["x", "yz", "w", "vu", "t"], "zh": ["文", "a", "好", "b", "天"]}
words = st.text("abcdefg ", min_size=1, max_size=9).filter(str.strip)


@cache
def llama():
    hf, tok = tiny_model("llama")
    return load_model(hf, tokenizer=tok)


def mlps(hf):
    return [layer.mlp for layer in (hf.base_model.h if hasattr(hf.base_model, "h") else hf.base_model.layers)]


def reader(mlp):
    return next(getattr(mlp, n) for n in ("down_proj", "dense_4h_to_h", "c_proj") if hasattr(mlp, n))


@torch.no_grad()
def activations(hf, tok, prompt, site):
    "[layer, pos, neuron] of one prompt, alone, BOS left out."
    got, handles = {}, []
    for l, mlp in enumerate(mlps(hf)):
        if site == "gate" and hasattr(mlp, "gate_proj"):
            handles.append(mlp.gate_proj.register_forward_hook(lambda m, i, o, l=l, mlp=mlp: got.__setitem__(l, mlp.act_fn(o[0]))))
        else:
            handles.append(reader(mlp).register_forward_pre_hook(lambda m, i, l=l: got.__setitem__(l, i[0][0])))
    ids = tok(prompt).input_ids
    hf(torch.tensor([ids]))
    for h in handles: h.remove()
    return torch.stack([got[l].reshape(len(ids), -1) for l in range(len(got))])[:, int(ids[0] == tok.bos_token_id):]


def brute(hf, tok, prompts, theta, token, site):
    "[input, layer, neuron] category index, [input, layer, neuron] language (-1 unless specific)."
    found, whose = [], []
    for texts in zip(*prompts.values()):
        acts = [activations(hf, tok, t, site) for t in texts]
        on = torch.stack([(a[:, -1] > theta) if token == "last" else (a > theta).any(1) for a in acts])
        c = on.sum(0).tolist()
        cat = [[0 if n == len(texts) else 1 if n > 1 else 2 if n == 1 else 3 for n in row] for row in c]
        found.append(torch.tensor(cat))
        whose.append(torch.where(found[-1] == 2, on.int().argmax(0), -1))
    return torch.stack(found), torch.stack(whose)
