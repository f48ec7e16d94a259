"""The recorder on one GPU: an 8B Llama shape with random weights, bf16.

    make bench-gpu        # prints the table, writes benchmarks/results_gpu.json; needs CUDA
"""
import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
LLAMA_8B = dict(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
)


def model_of(shape: dict, device: str, dtype):
    "A Llama of a shape with random weights, and the byte tokenizer of the tests."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from langneuron_mi import load_model
    from langneuron_mi.testing.tiny import tiny_model
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device): hf = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    finally: torch.set_default_dtype(kept)
    return load_model(hf, tokenizer=tiny_model("llama")[1])


def matrix_rate(device: str, dtype, rows: int, d: int, width: int) -> float:
    "FLOP/s of a matrix product in the shape of the MLP."
    import torch
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    a, b = torch.randn(rows, d, device=device, dtype=dtype), torch.randn(d, width, device=device, dtype=dtype)
    for _ in range(3): a @ b
    wait()
    n, t = 30, time.perf_counter()
    for _ in range(n): a @ b
    wait()
    return 2*rows*d*width*n/(time.perf_counter() - t)


def flops_per_token(v, length: int) -> float:
    "2 per weight of every linear layer of the body, and attention over half of the pairs of positions."
    cfg = v.hf.config
    linear = sum(m.weight.numel() for n, m in v.hf.named_modules() if m.__class__.__name__ == "Linear" and "lm_head" not in n)
    return 2*linear + cfg.num_hidden_layers*2*2*cfg.hidden_size*length/2


def measure(device: str = "cuda", shape: dict = LLAMA_8B, dtype=None, length: int = 1024, batch: int = 16, passes: int = 12) -> list[dict]:
    "Recordings of one and of three times `passes` batches, counts and counts with moments, with each attention."
    import torch
    from langneuron_mi import attend, record, view
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    model = model_of(shape, device, dtype)
    v = view(model)
    rate, tokens = matrix_rate(device, dtype, length*batch, v.d_model, v.d_mlp), passes*batch*(length - 1)
    limit = rate/flops_per_token(v, length)
    text = {"en": [f"{i} the quick brown fox jumps over the lazy dog" for i in range(3*tokens//40 + 10)]}
    v.fingerprint
    rows = []
    for attention in ("eager", "sdpa"):
        attend(model, attention)
        for groups in (("counts",), ("counts", "moments")):
            for n in (tokens, 3*tokens) if groups == ("counts", "moments") else (tokens,):
                args = dict(length=length, batch_size=batch, shard_size=2*batch, groups=groups, progress=False)
                record(model, text, tokens=2*batch*(length - 1), **args)
                if device == "cuda": torch.cuda.reset_peak_memory_stats()
                t = time.perf_counter()
                record(model, text, tokens=n, **args)
                s = time.perf_counter() - t
                rows.append(
                    dict(
                        attention=attention,
                        groups="+".join(groups),
                        tokens=n,
                        tok_s=round(n / s, 1),
                        limit_tok_s=round(limit, 1),
                        share=round(n / s / limit, 3),
                        tflop_s=round(rate / 1e12, 2),
                        peak_gb=round(torch.cuda.max_memory_allocated() / 2**30, 2) if device == "cuda" else None,
                    )
                )
    return rows


def main() -> None:
    import torch
    if not torch.cuda.is_available(): sys.exit("bench-gpu: no CUDA device here; nothing was measured and no file was written")
    from importlib.metadata import version
    rows = measure()
    r = dict(
        machine=torch.cuda.get_device_name(),
        command="make bench-gpu",
        shape=LLAMA_8B,
        rows=rows,
        versions={p: version(p) for p in ("torch", "transformers", "transformer-lens", "langneuron_mi")},
    )
    (HERE / "results_gpu.json").write_text(json.dumps(r, indent=1) + "\n")
    for x in rows: print("  ".join(f"{k} {y}" for k, y in x.items()))
    print(f"\nto reach: share of the measured matrix rate 0.45; peak memory the same for 1 and 3 times the tokens ({r['machine']})")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
