"""Quantised weights on one GPU: the checks of tests/models/test_quantised.py and tests/tuning/test_quantised_tuning.py, and what they cost.

    python benchmarks/quantised_gpu.py              # a Llama of 8B's width and four layers with random weights
    python benchmarks/quantised_gpu.py FOLDER_OR_ID # a model of your own

Prints a table and writes benchmarks/results_quantised_gpu.json; needs CUDA and pip install "langneuron_mi[tune,quantised]".
"""
import json
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
WIDE = dict(hidden_size=4096, intermediate_size=14_336, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
FORMS = (None, "nf4", "int8", "int4")
TEXT = {"en": [f"{i} the quick brown fox jumps over the lazy dog" for i in range(400)]}


def outputs(v) -> list:
    "The layer that reads `post`, by layer, as Hugging Face has it."
    return [b.mlp.out.original_component for b in v.model.blocks]


def counts_by_hand(v, windows, device: str):
    "How often each neuron's `post` is above 0, by plain hooks on the layers that read it."
    import torch
    got, counts = {}, 0
    handles = [m.register_forward_pre_hook(lambda mod, args, l=l: got.__setitem__(l, args[0])) for l, m in enumerate(outputs(v))]
    for batch in windows.batches("en", 0, windows.n_windows("en")):
        for row in batch:
            ids = row[row >= 0][None].to(device)
            with torch.no_grad(): v.hf(ids)
            counts = counts + torch.stack([(got[l][0, 1:] > 0).sum(0).cpu() for l in range(v.n_layers)])
    for h in handles: h.remove()
    return counts


def checks(path: str, how: str | None, device: str) -> dict:
    "One form: what is equal, what it takes, how fast it is."
    import torch
    from langneuron_mi import NeuronSet, ablate, load_corpus, load_model, record, view
    from langneuron_mi.models.quantised import dequantised, packed_layers, quantisation, stored
    from langneuron_mi.text.windows import pack
    model = load_model(path, quantization=how, device=device)
    v = view(model)
    weights = {id(p): p for p in v.hf.parameters()}.values()
    args = dict(length=128, site="post", batch_size=1, progress=False, seed=0)
    windows = pack(load_corpus(TEXT), v.tokenizer, length=128, tokens=2_000, seed=0, bos_token_id=v.bos_token_id)
    stats = record(model, TEXT, tokens=2_000, **args)
    layer = next(iter(packed_layers(v.hf).values()), None)
    eye = None if layer is None else torch.eye(layer.in_features, device=device, dtype=v.dtype)
    read = None if layer is None else float((layer(eye).T - dequantised(layer).to(v.dtype)).abs().max())
    neurons = NeuronSet([(0, 3), (v.n_layers - 1, 5)], v.shape, model=v.fingerprint)
    ids = torch.arange(5, 25, device=device)[None]
    with ablate(neurons).on(model): got = v.logits(ids)
    def off(l):
        def hook(mod, args):
            x = args[0].clone()
            x[..., neurons.neurons_in(l).to(x.device)] = 0
            return (x,)
        return hook
    handles = [m.register_forward_pre_hook(off(l)) for l, m in enumerate(outputs(v))]
    by_hand = v.logits(ids)
    for h in handles: h.remove()
    start = time.perf_counter()
    record(model, TEXT, tokens=8_000, **args | dict(batch_size=8))
    speed = 8_000/(time.perf_counter() - start)
    return dict(form=how or "full", says=quantisation(v.hf), fingerprint=v.fingerprint, same_counts=torch.equal(
        stats.count_pos[0], counts_by_hand(v, windows, device)), ablation_off_by=float((got - by_hand).abs().max()), read_off_by=read,
        weights_gb=round(sum(t.numel()*t.element_size() for p in weights for t in stored(p))/1e9, 3), tok_s=round(speed, 1),
        tuning=tuning(model, device))


def tuning(model, device: str) -> dict | str:
    "Three steps on a few neurons; the peak beside the formula's, or why it does not run."
    import torch
    from langneuron_mi import NeuronSet, view
    from langneuron_mi.tuning.memory import predict_memory
    from langneuron_mi.tuning.neuron_lora import TuneConfig
    from langneuron_mi.tuning.plain import plain_model
    from langneuron_mi.tuning.training import tune
    v = view(model)
    neurons = NeuronSet([(l, i) for l in range(v.n_layers) for i in range(5)], v.shape, model=v.fingerprint)
    dtype = str(v.dtype).removeprefix("torch.")
    config = TuneConfig(rank=8, max_steps=3, batch_size=2, dtype=dtype, gradient_checkpointing=True)
    rows = [dict(input_ids=x, labels=x) for x in torch.randint(5, 200, (6, 64)).tolist()]
    said = predict_memory(plain_model(model), neurons, config, length=64).total/1e9
    if device == "cuda": torch.cuda.reset_peak_memory_stats()
    try:
        with tempfile.TemporaryDirectory() as out: moved = int(tune(model, rows, neurons, config, out=out).check().changed.sum())
    except (RuntimeError, NotImplementedError, TypeError) as e: return f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"
    peak = torch.cuda.max_memory_allocated()/1e9 if device == "cuda" else None
    return dict(moved=moved, predicted_gb=round(said, 2), peak_gb=peak and round(peak, 2))


def saved(folder: str, size: dict) -> str:
    "A random Llama of some size as a folder in bf16."
    import torch
    from langneuron_mi.testing.tiny import tiny_model
    hf, tok = tiny_model("llama", std=.02, **size)
    hf.to(torch.bfloat16).save_pretrained(folder), tok.save_pretrained(folder)
    return folder


def measure(path: str, device: str = "cuda") -> list[dict]:
    "Every form on one device; nf4 on the CPU as well, where it should be the same model."
    from langneuron_mi import load_model, view
    rows = []
    for how in FORMS:
        try: rows.append(checks(path, how, device))
        except (RuntimeError, ValueError, TypeError, ImportError) as e: rows.append(dict(form=how or "full", error=f"{type(e).__name__}: {e}"[:400]))
    rows.append(dict(form="nf4 on the CPU", fingerprint=view(load_model(path, quantization="nf4", device="cpu")).fingerprint))
    return rows


def main(path: str | None = None) -> None:
    import torch
    if not torch.cuda.is_available(): sys.exit("quantised_gpu: no CUDA device here; nothing was measured and no file was written")
    from importlib.metadata import version
    with tempfile.TemporaryDirectory() as folder: rows = measure(path or saved(folder, WIDE))
    packages = ("torch", "transformers", "transformer-lens", "bitsandbytes", "torchao", "peft", "langneuron_mi")
    r = dict(machine=torch.cuda.get_device_name(), model=path or WIDE, rows=rows, versions={p: version(p) for p in packages})
    (HERE / "results_quantised_gpu.json").write_text(json.dumps(r, indent=1) + "\n")
    for x in rows: print("  ".join(f"{k} {y}" for k, y in x.items()))
    print("\nto reach: same_counts True; ablation_off_by 0; read_off_by 0 or a rounding of bf16; nf4 has one fingerprint on both devices")


if __name__ == "__main__": main(*sys.argv[1:2])
