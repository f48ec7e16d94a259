"""What a user would use instead, beside us in one process: recording, identification, generation under an intervention.

`make peers` puts nnsight, pyvene and steering-vectors into .peers/ (without their dependencies, which would replace ours); a
library that is not there is left out and named in the results.
"""
import logging
import sys
import time
import warnings
from importlib.metadata import distributions
from pathlib import Path

PEERS = Path(__file__).parent.parent / ".peers"
LENGTH, BATCH = 256, 8


def peer(name: str):
    "A library from .peers/, or None."
    folder = PEERS / name
    if not folder.exists(): return None
    sys.path.append(str(folder))
    logging.disable(logging.WARNING)
    return __import__(name.replace("-", "_"))


def peer_versions() -> dict:
    "Versions of the libraries in .peers/."
    return {n: next(d.version for d in distributions(path=[str(PEERS / n)]) if d.name.replace("_", "-").lower() == n)
            for n in ("nnsight", "pyvene", "steering-vectors") if (PEERS / n).exists()}


def take_turns(contenders: dict, rounds: int) -> dict:
    "Seconds of each contender, the best of some rounds, one after the other in each."
    best = {}
    for _ in range(rounds):
        for name, fn in contenders.items():
            t = time.perf_counter()
            fn()
            best[name] = min(best.get(name, 1e9), time.perf_counter() - t)
    return best


def recording_peers(windows: int = 8, rounds: int = 2) -> dict:
    "Counting active neurons over the same text: tokens per second of each way, and that all count the same."
    import torch
    from common import corpus
    from transformers import AutoModelForCausalLM
    from langneuron_mi import load_model, record, view
    from langneuron_mi.models.bundled import bundled_folder
    from langneuron_mi.text.windows import pack
    warnings.filterwarnings("ignore")
    model = load_model("gemma-3-270m")
    v = view(model)
    text, tokens = corpus().select(["en"]), windows*(LENGTH - 1)
    w = pack(text, v.tokenizer, tokens=tokens, length=LENGTH, seed=0, bos_token_id=v.bos_token_id)
    ids = torch.cat([b for b in w.batches("en", 0, w.n_windows("en"))])
    batches, texts = list(ids.split(BATCH)), w.offsets("en").tolist() + [tokens]
    fresh = lambda: AutoModelForCausalLM.from_pretrained(bundled_folder("gemma-3-270m"), dtype=torch.float32).eval()
    hf, found, names = fresh(), {}, {v.point(l, "pre").name: l for l in range(v.n_layers)}
    start = lambda: torch.zeros(v.n_layers, v.d_mlp, dtype=torch.int64)

    def ours():
        found["record"] = record(
            model, text, langs=["en"], tokens=tokens, length=LENGTH, batch_size=BATCH, groups="counts", progress=False
        ).count_pos[0]

    def run_with_cache():
        counts = start()
        for b in batches:
            _, cache = model.run_with_cache(b, names_filter=lambda n: n in names)
            for n, l in names.items(): counts[l] += (cache[n][:, 1:] > 0).sum((0, 1))
        found["run_with_cache"] = counts
    def per_text(batched: bool):
        "Hooks that move every activation to the CPU and keep it until the text is done."
        counts, kept = start(), {}
        handles = [
            layer.mlp.act_fn.register_forward_hook(lambda m, i, o, l=l: kept.__setitem__(l, o.detach().cpu().numpy()))
            for l, layer in enumerate(hf.model.layers)
        ]
        rows = batches if batched else [torch.from_numpy(w.streams["en"][a:b].astype("int64"))[None] for a, b in zip(texts, texts[1:])]
        for row in rows:
            if not batched: row = torch.cat([torch.tensor([[v.bos_token_id]]), row], 1)
            hf(row, use_cache=False)
            for l, a in kept.items(): counts[l] += torch.from_numpy((a[:, 1:] > 0).sum((0, 1)))
        for h in handles: h.remove()
        found["hooks_batched" if batched else "hooks_per_text"] = counts

    contenders = dict(
        record=ours, run_with_cache=run_with_cache, hooks_batched=lambda: per_text(True), hooks_per_text=lambda: per_text(False)
    )
    if nnsight := peer("nnsight"):
        traced = nnsight.NNsight(hf)
        def with_nnsight():
            counts = start()
            for b in batches:
                with traced.trace(b):
                    for l in range(v.n_layers): counts[l] += (traced.model.layers[l].mlp.gate_proj.output[:, 1:] > 0).sum((0, 1))
            found["nnsight"] = counts
        contenders["nnsight"] = with_nnsight
    if pyvene := peer("pyvene"):
        counting = start()
        def counter(l):
            def see(base, source):
                counting[l] += (base[:, 1:] > 0).sum((0, 1))
                return base
            return see

        watched = pyvene.IntervenableModel(
            [dict(component=f"model.layers[{l}].mlp.act_fn.output", intervention=counter(l)) for l in range(v.n_layers)], model=fresh()
        )

        def with_pyvene():
            counting.zero_()
            for b in batches: watched({"input_ids": b})
            found["pyvene"] = counting.clone()
        contenders["pyvene"] = with_pyvene
    v.fingerprint
    with torch.inference_mode():
        v.body(batches[0])
        seconds = take_turns(contenders, rounds)
    off = {
        k: int((c - found["record"]).abs().sum()) for k, c in found.items() if k not in ("record", "hooks_per_text")
    }  # texts read alone are another context
    return dict(
        recording_peers={k: round(tokens / s, 1) for k, s in seconds.items()},
        recording_peers_differ_by=off,
        recording_peers_counted=int(found["record"].sum()),
        peer_versions=peer_versions(),
    )


def double_loop(counts, n: list[int], top: float = .01, share: float = .95) -> list[list[tuple[int, int]]]:
    "LAPE as its definition reads, neuron by neuron: a first implementation in plain Python."
    import math
    langs, layers, width = counts.shape
    rates, entropies = {}, {}
    for layer in range(layers):
        for neuron in range(width):
            p = [float(counts[k, layer, neuron])/n[k] for k in range(langs)]
            rates[layer, neuron] = p
            total = sum(p)
            entropies[layer, neuron] = -sum(x/total*math.log(x/total) for x in p if x > 0) if total else math.inf
    values = sorted(x for p in rates.values() for x in p)
    bar = values[round(len(values)*share) - 1]
    able = sorted((e, key) for key, e in entropies.items() if max(rates[key]) > bar)
    taken = [key for _, key in able[:round(layers*width*top)]]
    return [sorted(key for key in taken if rates[key][k] > bar) for k in range(langs)]


def identification_peer() -> dict:
    "LAPE on counts of the shape of gemma-3-270m in eight languages, beside the double loop: seconds, and that the neurons are the same."
    import torch
    from langneuron_mi import ActivationStats, lape
    langs, n, shape = "en de fr ru zh ja ar tr".split(), 30_000, (18, 2048)
    gen = torch.Generator().manual_seed(0)
    counts = (torch.rand(len(langs), *shape, generator=gen)**3*torch.rand(shape, generator=gen)*n).long()
    stats = ActivationStats.from_counts(counts, [n]*len(langs), langs)
    seconds, found = {}, {}
    def ours(): found["lape"] = [sorted(map(tuple, lape(stats)[l])) for l in langs]
    def loop(): found["double_loop"] = double_loop(counts, [n]*len(langs))
    ours()
    seconds = take_turns(dict(lape=ours, double_loop=loop), 2)
    assert [[tuple(map(int, x)) for x in l] for l in found["lape"]] == found["double_loop"], "not the same neurons"
    return dict(identification_peers={k: round(s, 4) for k, s in seconds.items()})


def generation_peers(rounds: int = 3, new: int = 24) -> dict:
    "16 prompts continued while 200 neurons of the last layers, or a direction, are changed: new tokens per second of each way."
    import torch
    from transformers import AutoModelForCausalLM
    from langneuron_mi import NeuronSet, amplify, load_model, view
    from langneuron_mi.models.bundled import bundled_folder
    model = load_model("gemma-3-270m")
    v = view(model)
    prompts = ["The most important thing in life is", "Yesterday I went to the market and"]*8
    ids, mask = v.encode(prompts)
    fresh = lambda: AutoModelForCausalLM.from_pretrained(bundled_folder("gemma-3-270m"), dtype=torch.float32).eval()
    hf, chosen = fresh(), {l: torch.arange(l, 2000, 60) for l in range(12, 18)}
    neurons = NeuronSet([(l, int(i)) for l, at in chosen.items() for i in at], shape=v.shape)
    out, options = {}, dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    def ours():
        with amplify(neurons, by=2.).on(model): out["amplify"] = v.generate(prompts, new, min_new_tokens=new)
    def own_hook():
        def double(mod, args, at):
            return (args[0].index_copy(-1, at, args[0][..., at] * 2),)

        handles = [
            hf.model.layers[l].mlp.down_proj.register_forward_pre_hook(lambda m, a, at=at: double(m, a, at)) for l, at in chosen.items()
        ]
        got = hf.generate(input_ids=ids, attention_mask=mask, **options)
        out["plain_hook"] = v.tokenizer.batch_decode(got[:, ids.shape[1]:], skip_special_tokens=True)
        for h in handles: h.remove()
    contenders = {"none": lambda: v.generate(prompts, new, min_new_tokens=new), "amplify": ours, "plain_hook": own_hook}
    if sv := peer("steering-vectors"):
        vector = sv.SteeringVector({l: torch.randn(v.d_model)*.01 for l in chosen}, "decoder_block")
        def steered():
            with vector.apply(hf): hf.generate(input_ids=ids, attention_mask=mask, **options)
        contenders["steering_vectors"] = steered
    if pyvene := peer("pyvene"):

        def doubling(at):
            return lambda base, source: base.index_copy(-1, at, base[..., at] * 2)

        changed = pyvene.IntervenableModel(
            [dict(component=f"model.layers[{l}].mlp.act_fn.output", intervention=doubling(at)) for l, at in chosen.items()], model=fresh()
        )

        def with_pyvene():
            _, got = changed.generate({"input_ids": ids, "attention_mask": mask}, intervene_on_prompt=True, **options)
            out["pyvene"] = v.tokenizer.batch_decode(got[:, ids.shape[1]:], skip_special_tokens=True)
        contenders["pyvene"] = with_pyvene
    with torch.inference_mode():
        v.generate(prompts, 4)
        seconds = take_turns(contenders, rounds)
    return dict(
        generation_peers={k: round(len(prompts) * new / s, 1) for k, s in seconds.items()},
        generation_peers_same_text={k: sum(a == b for a, b in zip(x, out["amplify"])) for k, x in out.items()},
        generation_prompts=len(prompts),
    )
