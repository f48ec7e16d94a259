"""Recording a mixture of experts beside its own forward pass, and what the counts of a large mixture cost.

    python benchmarks/experts.py           # both, into benchmarks/experts_results.json
    python benchmarks/experts.py speed     # a Qwen3-MoE shape of 100 M weights, random
    python benchmarks/experts.py counts    # 4.7 million expert neurons (48 layers x 128 experts x 768) in 18 languages
    python benchmarks/experts.py gpu       # a Qwen3-30B-A3B shape in bfloat16 on one GPU, random weights

Every figure is measured here and now; nothing is a test. Each part runs in a process of its own.
"""
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")
HERE, LENGTH, BATCH, WINDOWS = Path(__file__).parent, 256, 8, 16

from common import corpus, peak_mb  # noqa: E402

SMALL = dict(hidden_size=512, num_hidden_layers=8, num_experts=32, num_experts_per_tok=4, moe_intermediate_size=256,
             num_attention_heads=8, num_key_value_heads=4, head_dim=64, intermediate_size=1024, max_position_embeddings=1024)
LARGE = dict(hidden_size=2048, num_hidden_layers=48, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
             num_attention_heads=32, num_key_value_heads=4, head_dim=128, intermediate_size=6144, max_position_embeddings=4096)


def mixture(shape: dict, dtype, device: str):
    "A Qwen3-MoE of random weights, hooked, and its byte tokenizer."
    import torch
    import transformers as tf
    from langneuron_mi import load_model
    from langneuron_mi.testing.tiny import _byte_tokenizer
    tok = _byte_tokenizer()
    cfg = tf.Qwen3MoeConfig(vocab_size=len(tok), pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape)
    torch.manual_seed(0)
    with torch.device(device): hf = tf.AutoModelForCausalLM.from_config(cfg, dtype=dtype).eval()
    return load_model(hf, tokenizer=tok)


def timed(model, batch: int, rounds: int, texts) -> dict:
    "Tokens per second of the body alone and of recordings, the best of some rounds, taking turns."
    import torch
    from langneuron_mi import view
    from langneuron_mi.recording.recorder import Recorder, Shard
    from langneuron_mi.text.windows import pack
    v, n = view(model), WINDOWS*(LENGTH - 1)
    w = pack(texts, v.tokenizer, tokens=n, length=LENGTH, seed=0, bos_token_id=v.bos_token_id)
    batches = [b for i in range(0, WINDOWS, batch) for b in w.batches("en", i, min(i + batch, WINDOWS))]
    recorders = {"record counts": Recorder(model, ("counts",), batch_size=batch),
                 "record counts and moments": Recorder(model, ("counts", "moments"), batch_size=batch)}
    def sync():
        if v.device.type == "cuda": torch.cuda.synchronize()
    def body():
        for b in batches: v.body(b)
    contenders = {"own forward pass": body} | {k: lambda r=r: r.run(w, Shard(0, "en", 0, WINDOWS)) for k, r in recorders.items()}
    best = {}
    with torch.inference_mode():
        for _ in range(rounds + 1): # the first is not counted
            for name, fn in contenders.items():
                sync()
                t = time.perf_counter()
                fn()
                sync()
                best[name] = min(best.get(name, 1e9) if _ else 1e9, time.perf_counter() - t)
    rows = {name: dict(tok_s=round(n/s, 1), times_own=round(s/best["own forward pass"], 3)) for name, s in best.items()}
    weights = sum(p.numel() for p in v.hf.parameters())
    return dict(weights_m=round(weights/1e6, 1), experts=v.hf.config._experts_implementation, dtype=str(v.dtype), batch=batch, rows=rows)


def speed() -> dict:
    import torch
    return timed(mixture(SMALL, torch.float32, "cpu"), BATCH, 5, corpus().select(["en"]))


def gpu() -> dict:
    import torch
    from langneuron_mi.text.sources import load_corpus
    texts = load_corpus({"en": [f"{i} the quick brown fox jumps over the lazy dog {i*i}" for i in range(2000)]})
    return dict(device=torch.cuda.get_device_name()) | timed(mixture(LARGE, torch.bfloat16, "cuda"), BATCH, 3, texts)


def counts() -> dict:
    "Memory and file of the counts, language by language as `record` puts them together; then LAPE on them."
    import torch
    from langneuron_mi import ActivationStats, lape
    from langneuron_mi.core.layout import Layout, Parts
    from langneuron_mi.recording.record import _put
    layout = Layout(((Parts("experts", 768, 128),),)*48)
    langs = tuple("en de fr ru zh ja ar tr es it pt vi id th ko pl sw hi".split())
    n, base, tensors, t = 1_000_000, peak_mb(), {}, time.perf_counter()
    size = len(langs)*layout.size*8/2**20
    for lang in langs:
        routed = torch.randint(0, n//8, (48, 128))
        found = dict(count_pos=torch.randint(0, n//32, layout.shape), routed=routed, router_weight=routed.double()/8)
        _put(tensors, found, langs, lang)
    meta, routing = dict(parts=layout.to_json()), {k: tensors[k] for k in ("routed", "router_weight")}
    stats = ActivationStats(langs, {l: n for l in langs}, tensors["count_pos"], meta=meta, routing=routing)
    made = peak_mb() - base
    with tempfile.TemporaryDirectory() as folder:
        path = stats.save(Path(folder)/"stats.safetensors")
        file, saved = path.stat().st_size/2**20, peak_mb() - base
    t = time.perf_counter()
    lape(stats)
    return dict(counts_mb=round(size, 1), memory_ratio=round(made/size, 3), with_saving_ratio=round(saved/size, 3),
                file_ratio=round(file/size, 3), lape_s=round(time.perf_counter() - t, 1), with_lape_ratio=round((peak_mb() - base)/size, 3))


def main(parts: list[str]) -> None:
    path = HERE/"experts_results.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    found |= dict(machine=f"{platform.machine()}, {os.cpu_count()} cores", command="python benchmarks/experts.py")
    for part in parts or ["speed", "counts"]:
        out = subprocess.run([sys.executable, __file__, "--child", part], capture_output=True, text=True)
        if out.returncode: raise SystemExit(out.stderr)
        found[part] = json.loads(out.stdout.splitlines()[-1])
        print(part, json.dumps(found[part], indent=1))
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    if "--child" in sys.argv: print(json.dumps(dict(speed=speed, counts=counts, gpu=gpu)[sys.argv[-1]]()))
    else: main(sys.argv[1:])
