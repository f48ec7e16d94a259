"""Two Ray workers beside two plain processes and beside one, every worker and process with one thread; more workers by simulation.

    python benchmarks/ray_bench.py [--tokens 12240] [--rounds 3]     # prints the table, writes benchmarks/ray_results.json

gemma-3-270m on Bible text, English and German. The plain processes record one language each, which is what a user without Ray would do;
Ray gets both as one recording. All models are loaded before the clock starts; packing, merging and the finished statistics are inside it.
The contenders take turns, and the best of the rounds counts. The simulation takes two measured numbers, how long the merging
process needs for
a shard's result and how unequal shards are, and the shard of `plan` for an 8B model.
"""
import argparse
import heapq
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ |= {k: "1" for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE")}
warnings.filterwarnings("ignore")
HERE = Path(__file__).parent
LANGS, ARGS = ["en", "de"], dict(length=256, batch_size=4, shard_size=4, progress=False)


def corpus():
    from langneuron_mi.text.sources import load_corpus
    return load_corpus("bible", LANGS)


def child() -> None:
    "A plain process: loads the model, then records the languages that each line of its input names."
    import torch
    from langneuron_mi.models.loading import load_model
    from langneuron_mi.models.view import view
    from langneuron_mi.recording.record import record
    torch.set_num_threads(1)
    model, text = load_model("gemma-3-270m"), corpus()
    view(model).fingerprint
    print("ready", flush=True)
    for line in sys.stdin:
        langs, tokens = json.loads(line)
        record(model, text, langs=langs, tokens=tokens, **ARGS)
        print("done", flush=True)


class Plain:
    "Plain processes that wait for work."
    def __init__(self, n: int):
        self.procs = [
            subprocess.Popen(
                [sys.executable, __file__, "--child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
            )
            for _ in range(n)
        ]
        for p in self.procs:
            self.expect(p, "ready")

    def expect(self, p, word: str) -> None:
        for line in p.stdout:
            if line.strip() == word: return
        raise SystemExit(f"a plain process ended with code {p.wait()}")

    def run(self, jobs: list) -> float:
        "Seconds until all jobs, one a process, are done."
        t = time.perf_counter()
        for p, job in zip(self.procs, jobs): print(json.dumps(job), file=p.stdin, flush=True)
        for p, _ in zip(self.procs, jobs): self.expect(p, "done")
        return time.perf_counter() - t

    def close(self) -> None:
        for p in self.procs:
            p.stdin.close()
            p.wait()


def blob(v, common, size: int):
    "A result of so many bytes, as a shard's would be."
    import numpy as np
    return {k: np.ones(size // 32) for k in ("sum", "sumsq", "max", "count")}


def merge_rate(engine, size: int = 14_680_064, n: int = 12) -> float:
    "Bytes/s at which the merging process takes results in: fetched from Ray's memory, copied, added up."
    import torch
    from langneuron_mi.scale.recipes import Recipe
    pool, total, took = engine.pool(Recipe("gemma-3-270m"), None), None, []
    t = time.perf_counter()
    for part in pool.map(blob, [size] * n):
        got = {k: torch.from_numpy(x.copy()) for k, x in part.items()}
        total = got if total is None else {k: torch.add(total[k], x) for k, x in got.items()}
        took.append(time.perf_counter() - t)
        t = time.perf_counter()
    return size / statistics.median(took[2:])


def simulate(workers: int, shards: int, shard_s: float, spread: float, merge_s: float, ahead: int = 4, seed: int = 0) -> float:
    """Share of the workers' time that is spent on shards, with results merged one at a time and in order, and no more than
    `ahead` units per worker unmerged."""
    rng = random.Random(seed)
    free, merged, back, now, clock, handed = [0.] * workers, 0, {}, 0., 0., 0
    work, flying = 0., []  # flying: (finish, shard)
    idle = workers
    while merged < shards:
        while idle and handed < shards and handed < merged + ahead * workers:
            s = shard_s * max(.2, rng.gauss(1, spread))
            work += s
            heapq.heappush(flying, (now + s, handed))
            handed, idle = handed + 1, idle - 1
        if merged in back:  # the merging process is busy for `merge_s`
            clock = max(clock, back.pop(merged)) + merge_s
            merged += 1
            if handed - merged >= ahead * workers - 1: now = max(now, clock)  # workers waited for room
            continue
        now, i = heapq.heappop(flying)
        back[i], idle = now, idle + 1
    return work / workers / max(now, clock)


def measure(tokens: int, rounds: int) -> dict:
    "Tokens/s of one process, two processes, two Ray workers; the best of the rounds."
    from langneuron_mi.scale.ray import RayEngine
    from langneuron_mi.recording.record import record
    import torch
    torch.set_num_threads(1)
    text, half, best = corpus(), tokens // 2, {}
    def keep(name, s):
        best[name] = max(best.get(name, 0), round(tokens / s, 1))
        print(f"{name}: {tokens / s:.1f}", file=sys.stderr, flush=True)
    plain = Plain(2)
    print("two processes have loaded the model", file=sys.stderr, flush=True)
    with RayEngine(workers=2) as engine:
        record("gemma-3-270m", text, tokens=1020, engine=engine, **ARGS)  # both workers have loaded
        print("two Ray workers have loaded it", file=sys.stderr, flush=True)
        for _ in range(rounds):
            keep("two_processes_tok_s", plain.run([(["en"], half), (["de"], half)]))
            t = time.perf_counter()
            record("gemma-3-270m", text, tokens=half, engine=engine, **ARGS)
            keep("two_ray_workers_tok_s", time.perf_counter() - t)
        keep("one_process_tok_s", plain.run([(LANGS, half)]))
        plain.close()
        rate = merge_rate(engine)
    return best | dict(merge_mb_s=round(rate / 1e6))


def main(tokens: int, rounds: int) -> None:
    from transformers import LlamaConfig
    from langneuron_mi.core.fingerprints import provenance
    from langneuron_mi.core.atomic import save_json
    from langneuron_mi.scale.plan import plan, size_of
    got = measure(tokens, rounds)
    got |= dict(
        ray_to_two_processes=round(got["two_ray_workers_tok_s"] / got["two_processes_tok_s"], 3),
        ray_to_one_process=round(got["two_ray_workers_tok_s"] / got["one_process_tok_s"], 3),
    )
    llama = size_of(
        LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
        )
    )
    p = plan(llama, tokens=100e6, langs=18, gpus=1, flop_s=600e12)
    each = 14_680_064 * (1 / 1.25e9 + 1 / (got["merge_mb_s"] * 1e6))  # 10 Gbit/s, then the measured rate
    got["simulated_8b"] = {str(n): round(simulate(n, p.shards, p.shard_s, 0.1, each), 3) for n in (1, 2, 8, 32, 128, 512)}
    got |= dict(
        tokens=tokens,
        rounds=rounds,
        machine=f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        command=" ".join(["python", *sys.argv]),
        versions=provenance()["packages"],
    )
    for k, x in got.items():
        print(f"{k:24} {x}")
    save_json(HERE / "ray_results.json", got)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=12240)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true")
    a = parser.parse_args()
    child() if a.child else main(a.tokens, a.rounds)
