"""How time and memory of a recording grow with tokens, layers, neurons and languages, and what window and batch cost."""
import time
import warnings

warnings.filterwarnings("ignore")


def exponent(x: list, y: list) -> float:
    "Slope of the straight line through the logarithms."
    import numpy as np
    return round(float(np.polyfit(np.log(x), np.log(y), 1)[0]), 3)


def _tiny(**config):
    from langneuron_mi import load_model
    from langneuron_mi.testing.tiny import tiny_model

    sizes = dict(
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=512,
        num_hidden_layers=2,
        max_position_embeddings=512,
    )
    hf, tok = tiny_model("llama", std=0.05, **sizes | config)
    return load_model(hf, tokenizer=tok)


def _texts(langs: list[str], tokens: int) -> dict:
    "Made-up text, one byte a token."
    line = "the quick brown fox jumps over the lazy dog and sleeps in the sun "
    return {l: [f"{l} {i} {line}" for i in range(tokens//60 + 2)] for l in langs}


def _measure(model, langs: list[str], tokens: int, **kwargs) -> dict:
    "Seconds and peak memory of one recording, checkpoints included."
    import tempfile
    from common import peak_mb
    from langneuron_mi import record
    from langneuron_mi.text.sources import load_corpus
    corpus = load_corpus(_texts(langs, tokens))
    t = time.perf_counter()
    record(model, corpus, tokens=tokens, out=tempfile.mkdtemp(), progress=False, **kwargs)
    return dict(s=round(time.perf_counter() - t, 3), mb=round(peak_mb(), 1))


def tokens_tiny() -> dict:
    "1,000 to 1,000,000 tokens through a tiny model, small ones first: peak memory never falls, so a flat one says that nothing grew."
    model, sizes = _tiny(), [1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000]
    _measure(model, ["en"], 5_000)
    rows = [dict(tokens=n, **_measure(model, ["en"], n)) for n in sizes]
    big = [r for r in rows if r["tokens"] >= 10_000]
    return dict(curve_tokens_tiny=rows, curve_tokens_tiny_exponent=exponent([r["tokens"] for r in big], [r["s"] for r in big]),
                curve_tokens_tiny_memory_ratio=round(rows[-1]["mb"]/rows[2]["mb"], 3))


def tokens_gemma() -> dict:
    "1,000 to 30,000 tokens through gemma-3-270m."
    import tempfile
    from common import corpus, peak_mb
    from langneuron_mi import load_model, record, view
    model, text, rows = load_model("gemma-3-270m"), corpus().select(["en"]), []
    view(model).fingerprint
    for n in (1_000, 1_000, 3_000, 10_000, 30_000):  # the first is not counted
        t = time.perf_counter()
        record(model, text, tokens=n, out=tempfile.mkdtemp(), progress=False)
        rows.append(dict(tokens=n, s=round(time.perf_counter() - t, 2), mb=round(peak_mb(), 1)))
    rows = rows[1:]
    return dict(
        curve_tokens_gemma=rows,
        curve_tokens_gemma_exponent=exponent([r["tokens"] for r in rows], [r["s"] for r in rows]),
        curve_tokens_gemma_memory_ratio=round(rows[-1]["mb"] / rows[0]["mb"], 3),
    )


def shapes() -> dict:
    "Layers, neurons and languages, each alone, on a tiny model; every measurement the best of two."
    out = {}
    def curve(name: str, values: list[int], make, langs=lambda n: ["en"]):
        rows = []
        for n in values:
            model = make(n)
            _measure(model, langs(n)[:1], 2_000)
            rows.append(
                {name: n}
                | min((_measure(model, langs(n), 8_000 // (1 if name != "languages" else 4)) for _ in range(2)), key=lambda r: r["s"])
            )
        out[f"curve_{name}"], out[f"curve_{name}_exponent"] = rows, exponent(values, [r["s"] for r in rows])
    curve("layers", [4, 8, 16, 32], lambda n: _tiny(num_hidden_layers=n))
    curve("neurons", [1024, 2048, 4096, 8192], lambda n: _tiny(intermediate_size=n))
    shared = _tiny()
    curve("languages", [1, 2, 4, 8, 16], lambda n: shared, lambda n: "en de fr ru zh ja ar tr es it pt vi id th ko pl".split()[:n])
    return out


def windows() -> dict:
    """Window length with each attention, and batch size: tokens per second through gemma-3-270m; and what batch size and
    attention change in the counts."""
    import torch
    from common import corpus
    from langneuron_mi import load_model, record, view
    from langneuron_mi.recording.recorder import Recorder
    from langneuron_mi.models.attention import attend
    from langneuron_mi.models.batches import window_bytes
    from langneuron_mi.text.windows import pack
    model = load_model("gemma-3-270m")
    v = view(model)
    rows, text = {}, corpus().select(["en"])
    with torch.inference_mode():
        for _ in range(2):
            for length in (128, 256, 512, 1024, 2048):
                ids = torch.randint(5, 20_000, (2048//length, length), generator=torch.Generator().manual_seed(0))
                for kind in ("eager", "sdpa"):
                    attend(model, kind)
                    v.body(ids[:1, :64])
                    t = time.perf_counter()
                    v.body(ids)
                    r = rows.setdefault(
                        (length, kind),
                        dict(length=length, attention=kind, tok_s=0.0, mb=round(window_bytes(v, length) * len(ids) / 2**20, 1)),
                    )
                    r["tok_s"] = max(r["tok_s"], round(2048 / (time.perf_counter() - t), 1))
    attend(model, "eager")
    w = pack(text, v.tokenizer, tokens=16*255, length=256, seed=0, bos_token_id=v.bos_token_id)
    recorder = Recorder(v, ("counts", "moments"))
    recorder.trial(w, 1)
    sizes = {n: round(max(recorder.trial(w, n) for _ in range(2)), 1) for n in (1, 2, 4, 8, 16)}
    args = dict(tokens=8*255, groups="counts", progress=False)
    counts = {n: record(model, text, batch_size=n, **args).count_pos for n in (8, 1)}
    attend(model, "sdpa")
    counts["sdpa"] = record(model, text, batch_size=8, **args).count_pos
    return dict(
        attention=list(rows.values()),
        batch_size_tok_s=sizes,
        batch_size_auto=recorder.measured_batch_size(w, 16),
        counts_total=int(counts[8].sum()),
        counts_changed_by_batch_size_1=int((counts[1] - counts[8]).abs().sum()),
        counts_changed_by_sdpa=int((counts["sdpa"] - counts[8]).abs().sum()),
    )


def compiled() -> dict:
    "torch.compile of the whole body without hooks, beside the body as it is: what it could give at most."
    import torch
    from transformers import AutoModelForCausalLM
    from common import best_of
    from langneuron_mi.models.bundled import bundled_folder
    hf = AutoModelForCausalLM.from_pretrained(bundled_folder("gemma-3-270m"), dtype=torch.float32).eval()
    ids = torch.randint(5, 20_000, (8, 256), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain = best_of(lambda: hf.model(ids, use_cache=False), 3)
        fast = torch.compile(hf.model)
        t = time.perf_counter()
        fast(ids, use_cache=False)
        first = time.perf_counter() - t
        return dict(
            compiled=dict(
                plain_tok_s=round(ids.numel() / plain, 1),
                compiled_tok_s=round(ids.numel() / best_of(lambda: fast(ids, use_cache=False), 3), 1),
                first_call_s=round(first, 1),
            )
        )
