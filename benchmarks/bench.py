"""Speed and memory of the recorder beside what a user would use instead, in one run.

    make peers            # once: nnsight, pyvene and steering-vectors into .peers/; without them their rows are left out
    make bench            # prints the table, writes benchmarks/results.json
    python benchmarks/bench.py some speed windows     # some parts again; the rest of results.json stays
    python benchmarks/bench.py table                  # the table of results.json

Every figure is measured here and now; nothing is a test. Each measurement of memory or of a whole command runs in a process of its own.
"""
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")
HERE = Path(__file__).parent
LENGTH, BATCH, WINDOWS = 256, 8, 16
GROUPS = ("counts", "moments", "quantiles", "text_means", "impact")

from common import best_of, corpus, peak_mb  # noqa: E402


def child(*args: str) -> dict:
    "Run one measurement of this file in a process of its own."
    out = subprocess.run([sys.executable, __file__, *args], capture_output=True, text=True)
    if out.returncode: raise SystemExit(out.stderr)
    return json.loads(out.stdout.splitlines()[-1])


def matmul_rate(v) -> float:
    "Measured FLOP/s of a matrix product in the shape of the model's MLP (batch x positions against d_model x d_mlp)."
    import torch
    a, b = torch.randn(LENGTH * BATCH, v.d_model), torch.randn(v.d_model, v.d_mlp)
    (a @ b)
    n, t = 60, time.perf_counter()
    for _ in range(n): a @ b
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] * n / (time.perf_counter() - t)


def body_flops(v) -> float:
    "FLOPs per token of the body's matrix products: 2 per weight of every linear layer, and the attention scores and values."
    linear = sum(m.weight.numel() for n, m in v.hf.named_modules() if m.__class__.__name__ == "Linear" and "lm_head" not in n)
    cfg = v.hf.config
    attention = cfg.num_hidden_layers * 2 * 2 * cfg.num_attention_heads * cfg.head_dim * LENGTH
    return 2 * linear + attention


def ready():
    "The model, its text, and the batches that every contender runs."
    import torch
    from langneuron_mi import load_model, view
    from langneuron_mi.text.windows import pack
    model = load_model("gemma-3-270m")
    v, text, tokens = view(model), corpus().select(["en"]), WINDOWS*(LENGTH - 1)
    w = pack(text, v.tokenizer, tokens=tokens, length=LENGTH, seed=0, bos_token_id=v.bos_token_id)
    batches = [b for i in range(0, w.n_windows("en"), BATCH) for b in w.batches("en", i, min(i + BATCH, w.n_windows("en")))]
    with torch.inference_mode(): v.body(batches[0])
    v.fingerprint
    return model, v, text, tokens, batches


def rates(contenders: dict, tokens: int, rounds: int, between=lambda: None) -> dict[str, float]:
    "Tokens per second of each contender, the best of some rounds, taking turns."
    import torch
    best = {k: 0. for k in contenders}
    with torch.inference_mode():
        for _ in range(rounds):
            between()
            for name, fn in contenders.items():
                t = time.perf_counter()
                fn()
                best[name] = max(best[name], tokens/(time.perf_counter() - t))
    return best


def speed() -> dict:
    """What stands between `record` and the limit: tokens per second, each the best of five rounds over the same windows,
    the contenders taking turns."""
    import torch
    from transformers import AutoModelForCausalLM
    from langneuron_mi import record
    from langneuron_mi.models.bundled import bundled_folder
    model, v, text, tokens, batches = ready()
    hf = AutoModelForCausalLM.from_pretrained(bundled_folder("gemma-3-270m"), dtype=torch.float32).eval()
    def hf_body():
        for b in batches: hf.model(b, use_cache=False)
    def bridge_body():
        for b in batches: v.body(b)
    def recorded(*groups): return lambda: record(model, text, tokens=tokens, length=LENGTH, batch_size=BATCH, groups=groups, progress=False)
    measured = []
    best = rates(
        dict(hf_body=hf_body, bridge_body=bridge_body, record=recorded("counts"), record_moments=recorded("counts", "moments")),
        tokens,
        5,
        lambda: measured.append(matmul_rate(v)),
    )
    return dict(
        limit_tok_s=round(max(measured) / body_flops(v), 1),
        **{f"{k}_tok_s": round(x, 1) for k, x in best.items()},
        matmul_gflop_s=round(max(measured) / 1e9, 1),
        body_mflop_per_token=round(body_flops(v) / 1e6, 1),
    )


def group_speed() -> dict:
    "Every group beside counts alone: tokens per second, the best of three rounds in turns."
    from langneuron_mi import record
    model, v, text, tokens, batches = ready()
    kept = dict(counts=("counts",)) | {k: ("counts", k) for k in GROUPS[1:]} | dict(all=GROUPS)
    best = rates(
        {
            k: lambda g=g: record(model, text, tokens=tokens, length=LENGTH, batch_size=BATCH, groups=g, progress=False)
            for k, g in kept.items()
        },
        tokens,
        3,
    )
    return dict(groups_tok_s={k: round(x, 1) for k, x in best.items()})


def record_peak(tokens: int) -> dict:
    "Peak memory of a recording of so many tokens."
    from langneuron_mi.models.loading import load_model
    from langneuron_mi.recording.record import record
    record(load_model("gemma-3-270m"), corpus(), langs=["en", "de"], tokens=tokens // 2, out=tempfile.mkdtemp(), progress=False)
    return dict(mb=round(peak_mb(), 1))


def lape_70b() -> dict:
    "LAPE on counts of a 70B model in 18 languages: seconds, and peak memory over the input's."
    import torch
    from langneuron_mi.find.identification import lape
    from langneuron_mi.recording.stats import ActivationStats
    langs = "en de fr ru zh ja ar tr es it pt vi id th ko pl sw hi".split()
    n = 1_000_000
    base = peak_mb()
    counts = torch.randint(0, n // 4, (len(langs), 80, 28672), dtype=torch.int64)
    size = counts.numel() * 8 / 2**20
    stats = ActivationStats(tuple(langs), {l: n for l in langs}, counts)
    t = time.perf_counter()
    lape(stats)
    return dict(s=round(time.perf_counter() - t, 2), ratio=round((peak_mb() - base) / size, 2))


def lambda_70b() -> dict:
    "The lambda score, its weight found by bisection, on counts of a 70B model in 18 languages: seconds, and peak memory over the input's."
    import torch
    from langneuron_mi.recording.stats import ActivationStats
    from langneuron_mi.find.identification import lambda_score
    langs, n, base = [f"x-{k}" for k in range(18)], 1_000_000, peak_mb()
    p = torch.distributions.Beta(.5, 3.).sample((80, 28672))
    counts = (p*torch.rand(len(langs), 80, 28672)*n).long()
    stats = ActivationStats(tuple(langs), {l: n for l in langs}, counts)
    t = time.perf_counter()
    lambda_score(stats)
    return dict(s=round(time.perf_counter() - t, 2), ratio=round((peak_mb() - base) / (counts.numel() * 8 / 2**20), 2))


def text_methods() -> dict:
    "Average precision and PLND of 18 layers x 2,048 neurons in 8 languages of 100 texts: seconds."
    import torch
    from langneuron_mi.recording.stats import ActivationStats
    from langneuron_mi.find.methods import average_precision, plnd
    texts = {f"x-{k}": torch.randn(18, 100, 2048) for k in range(8)}
    stats = ActivationStats.from_text_means(texts)
    object.__setattr__(stats, "impact", {k: x.abs() for k, x in texts.items()})
    t = time.perf_counter()
    average_precision(stats)
    ap, t = time.perf_counter() - t, time.perf_counter()
    plnd(stats)
    return dict(ap_s=round(ap, 2), plnd_s=round(time.perf_counter() - t, 2))


def steering() -> dict:
    "LSS beside the plain cost of its tokens and logits, and generation with and without an intervention."
    import torch
    from langneuron_mi import amplify, lape, load_model, load_probes, lss, record, view
    langs = ["en", "de", "fr", "ru"]
    model = load_model("gemma-3-270m")
    v = view(model)
    stats = record(model, corpus(), langs=langs, tokens=1000, progress=False)
    neurons = lape(stats)
    s = lss(model, {l: neurons[l] for l in langs}, load_probes("cldr", langs), ["mean"], stats=stats, n=100, controls=0, progress=False)
    ids, hidden = torch.randint(5, 2000, (64, 16)), torch.randn(128, v.d_model)
    with torch.inference_mode():
        body, head = (best_of(f) for f in (lambda: v.body(ids), lambda: v.head(hidden)))
        plain = s.work["forward_tokens"] * body / ids.numel() + s.work["logit_positions"] * head / len(hidden)
        prompts = ["The most important thing in life is", "Yesterday I went to the market and"] * 8
        def generate(): v.generate(prompts, 24)
        def steered():
            with amplify(neurons["de"], to=stats.value("de", "mean")).on(model): v.generate(prompts, 24)
        times = {"plain": [], "steered": []}
        for _ in range(4):  # in turns
            for name, f in (("plain", generate), ("steered", steered)):
                t = time.perf_counter()
                f()
                times[name].append(time.perf_counter() - t)
    return dict(
        lss_s=round(s.work["seconds"], 1),
        lss_tokens=s.work["forward_tokens"],
        lss_logit_positions=s.work["logit_positions"],
        lss_ratio=round(s.work["seconds"] / plain, 2),
        generation_ratio=round(min(times["plain"]) / min(times["steered"]), 2),
        generation_tok_s=round(len(prompts) * 24 / min(times["plain"]), 1),
    )


def demo() -> dict:
    "The demo from nothing but the installed packages and the converted model: seconds and peak memory."
    out = tempfile.mkdtemp()
    t = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "import sys; from langneuron_mi.cli import main; sys.exit(main())", "demo", "--out", out],
        check=True,
        stdout=sys.stderr,
        stderr=subprocess.DEVNULL,
    )
    s = time.perf_counter() - t
    t = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "import sys; from langneuron_mi.cli import main; sys.exit(main())", "demo", "--out", out],
        check=True,
        stdout=sys.stderr,
        stderr=subprocess.DEVNULL,
    )
    again = time.perf_counter() - t
    shutil.rmtree(out)
    return dict(s=round(s, 1), again_s=round(again, 1), mb=round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, 1))


def cpu_name() -> str:
    try: return next(l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name"))
    except (OSError, StopIteration): return platform.processor()


def main() -> None:
    from importlib.metadata import version

    r = dict(
        machine=f"{cpu_name()}, {os.cpu_count()} cores, {platform.platform()}",
        command="make bench",
        versions={p: version(p) for p in ("torch", "transformers", "transformer-lens", "langneuron_mi")}
        | dict(python=platform.python_version()),
        settings=dict(model="gemma-3-270m (Q4_K_M, dequantised), fp32", window=LENGTH, batch=BATCH),
    )
    so_far = HERE / "results.part.json"  # an hour's work is not lost with its last part
    for part in PARTS:
        r |= result(part)
        so_far.write_text(json.dumps(r, indent=1) + "\n")
    so_far.replace(HERE / "results.json")
    table(r)


PARTS = (
    "speed",
    "group_speed",
    "windows",
    "compiled",
    "recording_peers",
    "identification_peer",
    "generation_peers",
    "tokens_gemma",
    "tokens_tiny",
    "shapes",
    "record_peaks",
    "lape_70b",
    "lambda_70b",
    "text_methods",
    "steering",
    "demo",
)


def result(part: str) -> dict:
    "One part in a process of its own, under the names that results.json has for it."
    if part == "record_peaks": return {f"record_peak_mb_{n // 1000}k": child("record_peak", str(n))["mb"] for n in (10_000, 100_000)}
    t = time.perf_counter()
    got = child(part)
    if part in ("lape_70b", "lambda_70b"): got = {f"{part}_{k}": x for k, x in zip(("s", "mem_ratio"), got.values())}
    if part == "demo": got = dict(demo_s=got["s"], demo_again_s=got["again_s"], demo_peak_mb=got["mb"])
    print(f"{part}: {time.perf_counter() - t:.0f} s", file=sys.stderr)
    return got


def table(r: dict) -> None:
    "The figures with their ratios; what was not measured is left out."
    print(f"{r['machine']}\n")
    def rows(title: str, found: dict, base: float, unit: str = "tok/s", note: str = ""):
        if found: print(f"{title}{note}")
        for name, x in found.items(): print(f"  {name:<46}{x:>10.1f} {unit}   {x/base:.2f}")
    if "bridge_body_tok_s" in r:
        keys = dict(
            limit_tok_s="limit: matrix-product rate / FLOPs per token",
            hf_body_tok_s="Hugging Face body",
            bridge_body_tok_s="TransformerLens's body",
            record_tok_s="record, counts",
            record_moments_tok_s="record, counts and moments",
        )
        rows(
            "through gemma-3-270m, share of the limit",
            {n: r[k] for k, n in keys.items()},
            r["limit_tok_s"],
            note=" (to reach: record 0.75)",
        )
        print(f"  counts and moments over counts alone: {r['record_moments_tok_s'] / r['record_tok_s']:.3f} (0.95)")
    if g := r.get("groups_tok_s"):
        rows("groups, beside counts alone", g, g["counts"])
    if p := r.get("recording_peers"):
        rows("the same counts another way, beside record", p, p["record"], note=" (record at least 2.5 times run_with_cache)")
        print(
            f"  record over run_with_cache: {p['record'] / p['run_with_cache']:.2f}; counts that differ: "
            f"{r['recording_peers_differ_by']} of {r['recording_peers_counted']:,}; {r['peer_versions']}"
        )
    if p := r.get("generation_peers"):
        rows("generation while neurons are changed, beside none", p, p["none"])
        print(f"  texts equal to ours, of {r['generation_prompts']}: {r['generation_peers_same_text']}")
    if p := r.get("identification_peers"):
        print(
            f"LAPE, 8 x 36,864: {p['lape']:.3f} s; the double Python loop {p['double_loop']:.2f} s, "
            f"{p['double_loop'] / p['lape']:.0f} times as long"
        )
    for k in ("tokens_gemma", "tokens_tiny", "layers", "neurons", "languages"):
        if f"curve_{k}" in r:
            print(
                f"time against {k:<14} exponent {r[f'curve_{k}_exponent']}"
                + (
                    f"; peak memory of the largest over the smallest {r[f'curve_{k}_memory_ratio']}"
                    if f"curve_{k}_memory_ratio" in r
                    else ""
                )
            )
    if "attention" in r:
        for length in sorted({x["length"] for x in r["attention"]}):
            e, q = (next(x["tok_s"] for x in r["attention"] if x["length"] == length and x["attention"] == a) for a in ("eager", "sdpa"))
            print(f"window of {length:>5}: eager {e:.0f}, sdpa {q:.0f} tok/s   {q / e:.2f}")
        print(
            f"batch size: {r['batch_size_tok_s']} tok/s; auto takes {r['batch_size_auto']}; of {r['counts_total']:,} counts, batch "
            f"size 1 changes {r['counts_changed_by_batch_size_1']}, sdpa {r['counts_changed_by_sdpa']}"
        )
    if c := r.get("compiled"):
        print(
            f"torch.compile of the body without hooks: {c['compiled_tok_s'] / c['plain_tok_s']:.2f} of its speed, after "
            f"{c['first_call_s']:.0f} s"
        )
    if "record_peak_mb_10k" in r:
        print(
            f"peak memory of record, 10k and 100k tokens: {r['record_peak_mb_10k']:.0f} and {r['record_peak_mb_100k']:.0f} MB, "
            f"ratio {r['record_peak_mb_100k'] / r['record_peak_mb_10k']:.3f} (within 0.05 of 1)"
        )
    if "lape_70b_s" in r:
        print(
            f"LAPE, 80 layers x 28,672 x 18 languages: {r['lape_70b_s']:.1f} s (under 10), peak memory "
            f"{r['lape_70b_mem_ratio']:.2f} times the input (under 3)"
        )
    if "lambda_70b_s" in r:
        print(
            f"lambda score, the same, weight by bisection: {r['lambda_70b_s']:.1f} s, peak memory {r['lambda_70b_mem_ratio']:.2f} "
            f"times the input"
        )
    if "ap_s" in r:
        print(f"average precision, 36,864 neurons, 8 x 100 texts: {r['ap_s']:.1f} s (under 60); PLND {r['plnd_s']:.1f} s")
    if "lss_s" in r:
        print(
            f"LSS, 4 languages x 3 bases x 100 facts: {r['lss_s']:.1f} s, {r['lss_tokens']:,} tokens, {r['lss_logit_positions']:,} "
            f"with logits: {r['lss_ratio']:.2f} times their plain cost (under 1.2)"
        )
    if "demo_s" in r:
        print(f"demo: {r['demo_s']:.0f} s (under 600), peak {r['demo_peak_mb']:.0f} MB (under 6000); again {r['demo_again_s']:.0f} s")


def some(*parts: str) -> None:
    "Measure some parts again, each kept when it is done; the rest of results.json stays, and the file says so."
    for p in parts:
        got, path = result(p), HERE / "results.json"
        r = json.loads(path.read_text())
        r |= got | dict(measured_later=sorted({*r.get("measured_later", []), p}))
        path.write_text(json.dumps(r, indent=1) + "\n")
    table(r)


if __name__ == "__main__":
    if len(sys.argv) == 1: main()
    elif sys.argv[1] == "some": some(*sys.argv[2:])
    elif sys.argv[1] == "table": table(json.loads((HERE / "results.json").read_text()))
    else: print(json.dumps(globals()[sys.argv[1]](*map(int, sys.argv[2:]))))
