"""The model `langneuron` beside lm-eval's own `hf` on gemma-3-270m: the same items, per-item differences, and seconds.

python benchmarks/tasks_parity.py --data DATA --part xcopa --langs it     # DATA/xcopa/test.it.jsonl ..., DATA/xquad/xquad.en.json ...
Parts: xcopa (log-likelihoods and accuracy), xquad (generated answers), hook (an intervention beside the same edit by a PyTorch
hook inside hf).
Results are added to the JSON file --out, by part and language, so that the parts may be run one after the other.
"""
import argparse
import json
import time
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

warnings.simplefilter("ignore")


@contextmanager
def edited(hf, intervention):
    "The edit of an `ablate` or `amplify(by=)` intervention by plain PyTorch hooks on a Hugging Face model's down projections."
    with ExitStack() as stack:
        for e in intervention.edits:
            for layer, block in enumerate(hf.model.layers):
                cols = e.neurons.neurons_in(layer)
                if not len(cols): continue
                def scale(module, args, cols=cols, by=float(e.value[0])):
                    x = args[0].clone()
                    x[..., cols] = x[..., cols] * by
                    return (x,)
                stack.callback(block.mlp.down_proj.register_forward_pre_hook(scale).remove)
        yield


def run_hf(lm, tasks, limit):
    "lm-eval's own evaluation of its own model."
    from lm_eval.evaluator import evaluate
    for t in tasks.values(): t.set_fewshot_seed(seed=1234)
    out = evaluate(lm, {"tasks": dict(tasks)}, limit=limit, bootstrap_iters=0, log_samples=True)
    return out


def timed(fn):
    "What `fn` returns, its wall seconds and its CPU seconds: on a machine that others use too, the second are the ones to compare."
    wall, cpu = time.perf_counter(), time.process_time()
    return fn(), time.perf_counter() - wall, time.process_time() - cpu


def compare(ours, theirs, task) -> dict:
    "Per-item differences of one task."
    items = ours.items[ours.items.task == task]
    samples = sorted(theirs["samples"][task], key=lambda s: s["doc_id"])
    assert [h for h in items.hash] == [s["doc_hash"][:16] for s in samples], "the items are not the same"
    value = {m: float(x) for m, x in theirs["results"][task].items() if m.endswith(",none") and isinstance(x, (int, float))}
    own = {f"{m},none": float(x) for m, x in zip(ours.metrics.metric, ours.metrics.value)}
    out = dict(items=len(items), metrics=own, metrics_hf=value, metrics_identical={m: own[m] for m in own} == {m: value[m] for m in own})
    if len(items.loglik.iloc[0]):
        pairs = [(a, float(b[0])) for l, s in zip(items.loglik, samples) for a, b in zip(l, s["filtered_resps"])]
        out |= dict(
            log_likelihoods=len(pairs),
            max_difference=max(abs(a - b) for a, b in pairs),
            same_answers=sum(
                int(a) == max(range(len(s["filtered_resps"])), key=lambda i: s["filtered_resps"][i][0])
                for a, s in zip(items.answer, samples)
            ),
        )
    else:
        out |= dict(
            identical_texts=sum(a == s["filtered_resps"][0] for a, s in zip(items.answer, samples)),
            characters=int(items.answer.str.len().sum()),
        )
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True)
    p.add_argument("--part", choices=["xcopa", "xquad", "hook"], default="xcopa")
    p.add_argument("--langs", default="it")
    p.add_argument("--limit", type=int, default=500)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--attention", default="eager", help="of ours; hf's own is sdpa")
    p.add_argument("--answers", help="folder of kept answers, of both models: a killed comparison goes on (its seconds then mean nothing)")
    p.add_argument("--out", default="tasks_parity.json")
    a = p.parse_args()
    from lm_eval.models.huggingface import HFLM
    from langneuron_mi.change.interventions import Intervention, ablate, amplify
    from langneuron_mi.models.bundled import bundled_folder
    from langneuron_mi.models.loading import load_model
    from langneuron_mi.models.view import view
    from langneuron_mi.find.neurons import NeuronSet
    from langneuron_mi.measure.task_data import load_tasks
    from langneuron_mi.measure.tasks import evaluate
    folder = str(bundled_folder("gemma-3-270m"))
    model = load_model("gemma-3-270m", attention=a.attention)
    hf = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=a.batch_size)
    v = view(model)
    if a.answers:
        from lm_eval.api.model import CachingLM
        hf_model, hf = hf.model, CachingLM(hf, f"{a.answers}/hf-{a.part}.db")
    else: hf_model = hf.model
    edits = {"none": Intervention()}
    if a.part == "hook":
        gen = torch.Generator().manual_seed(0)
        some = NeuronSet(
            torch.stack([torch.randint(v.n_layers, (400,), generator=gen), torch.randint(v.d_mlp, (400,), generator=gen)], 1).unique(dim=0),
            v.shape,
            model=v.fingerprint,
        )
        edits = {"ablate": ablate(some), "amplify by 3": amplify(some, by=3.0)}
    if a.part == "hook" and a.answers:
        p.error("--answers does not tell edits apart in hf: leave it out for --part hook")
    names = [
        t
        for l in a.langs.split(",")
        for t in (["xcopa_" + l] if a.part == "xcopa" else ["xquad_" + l] if a.part == "xquad" else ["xcopa_" + l])
    ]
    for name in names:
        for said, edit in edits.items():
            tasks = load_tasks(name, a.data)
            ours, wall, cpu = timed(
                lambda: evaluate(model, tasks, edit, limit=a.limit, batch_size=a.batch_size, out=a.answers, progress=False)
            )
            with edited(hf_model, edit):
                theirs, wall_hf, cpu_hf = timed(lambda: run_hf(hf, tasks, a.limit))
            row = compare(ours, theirs, name) | dict(
                seconds=wall,
                seconds_hf=wall_hf,
                cpu_seconds=cpu,
                cpu_seconds_hf=cpu_hf,
                batch_size=a.batch_size,
                attention=a.attention,
                threads=torch.get_num_threads(),
                work=ours.work,
            )
            key = f"{a.part} {name}" + ("" if said == "none" else f", {said}")
            done = json.loads(Path(a.out).read_text()) if Path(a.out).exists() else {}
            Path(a.out).write_text(json.dumps(done | {key: row}, indent=1))
            print(key, json.dumps(row), flush=True)


if __name__ == "__main__": main()
