"What is right: Hugging Face's own loss, and edits by PyTorch hooks on its modules."
import torch

from langneuron_mi.change.interventions import Current, ablate, add, amplify, set_to

GERMANY = "The capital of Germany is"
PAIRS = [(GERMANY, [f"{GERMANY} Berlin", f"{GERMANY} Берлин", f"{GERMANY}柏林市中心"]), ("首都は", ["首都は東京", "首都はTokyo City"]),
         ("เมืองหลวงคือ", ["เมืองหลวงคือกรุงเทพ", "เมืองหลวงคือBangkok"]), ("a", ["ab", "a long answer of many words"])]


def hf_log_prob(hf, tok, prompt, text):
    "Minus Hugging Face's own loss, summed over the tokens of the text that the prompt does not have (byte tokens: nothing merges)."
    p, t = [1] + tok(prompt, add_special_tokens=False).input_ids, [1] + tok(text, add_special_tokens=False).input_ids
    cut = next((i for i, (a, b) in enumerate(zip(p, t)) if a != b), len(p))
    labels = torch.tensor([[-100]*cut + t[cut:]])
    with torch.no_grad(): return -float(hf(torch.tensor([t]), labels=labels).loss)*(len(t) - cut)


def plain_edit(hf, neurons, fn, positions, prompt):
    "The same edit by PyTorch hooks on Hugging Face's modules; `fn(a, layer_a) -> new a`; `prompt` positions are the prompt's."
    handles, past = [], {}
    for l, layer in enumerate(hf.model.layers):
        cols = [n for ll, n in neurons if ll == l]
        if not cols: continue
        def hook(m, args, out, l=l, cols=cols):
            n, seen = out.shape[1], past.get(l, 0) if CACHE["on"] else 0
            past[l] = seen + n
            at = seen + torch.arange(n)
            keep = dict(all=at >= 0, prompt=at < prompt, generated=at >= prompt, last=at >= prompt - 1)[positions]
            new = out.clone()
            edited = fn(out[..., cols], out)
            new[..., cols] = torch.where(keep[None, :, None], edited, out[..., cols])
            return new
        handles.append(layer.mlp.act_fn.register_forward_hook(hook))
    return handles


CACHE = dict(on=False)
SET = [(0, 3), (0, 10), (1, 7), (1, 40)]
VALUES = {"ablate": (lambda s: ablate(s), lambda a, full: a*0), "scale": (lambda s: amplify(s, by=3.), lambda a, full: a*3),
          "set": (lambda s: set_to(s, 1.5), lambda a, full: torch.full_like(a, 1.5)),
          "add": (lambda s: add(s, .5, scale=2.), lambda a, full: a + 1.),
          "set10p": (lambda s: set_to(s, Current("quantile", .1)), lambda a, full: full.quantile(.1, -1, keepdim=True).expand_as(a)),
          "setmax": (lambda s: set_to(s, Current("max")), lambda a, full: full.amax(-1, keepdim=True).expand_as(a)),
          "plusmax": (lambda s: add(s, Current("max")), lambda a, full: a + full.amax(-1, keepdim=True))}
