"Tasks: beside lm-eval's own `hf` model, with and without an intervention; kept answers; killed runs; errors."
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lens import lens_models

from langneuron_mi.change.interventions import Intervention, ablate, amplify
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.find.language_neurons import LanguageNeurons
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.measure.scoring import score
from langneuron_mi.measure.task_data import TaskError, find_files, load_tasks, read_rows, task_names
from langneuron_mi.measure.answers import Kept
from langneuron_mi.measure.task_model import LangNeuronLM
from langneuron_mi.measure.tasks import TaskResults, evaluate
from langneuron_mi.testing.tiny import tiny_model

DATA = Path(__file__).parents[1]/"data"/"tasks"  # a few items written by us: see the README there
NAMES = ["xcopa_it", "xwinograd_en", "xwinograd_jp", "xnli_vi", "belebele_ita_Latn", "include_base_44_italian_stem"]


@contextmanager
def by_hooks(hf, neurons: NeuronSet, by: float):
    "The same edit by plain PyTorch hooks on the down projections (Llama's family)."
    handles = []
    for layer, block in enumerate(hf.model.layers):
        cols = neurons.neurons_in(layer)
        def edit(module, args, cols=cols): return (args[0].index_copy(-1, cols, args[0][..., cols] * by),)
        handles.append(block.mlp.down_proj.register_forward_pre_hook(edit))
    try: yield
    finally:
        for h in handles: h.remove()


def lm_eval_hf(hf, tok, tasks, batch_size=3, **kwargs):
    "Samples of lm-eval's own evaluation of its own `hf` model, by task."
    from lm_eval.evaluator import evaluate as lm_evaluate
    from lm_eval.models.huggingface import HFLM
    for t in tasks.values(): t.set_fewshot_seed(seed=1234)
    out = lm_evaluate(HFLM(pretrained=hf, tokenizer=tok, batch_size=batch_size, **kwargs), {"tasks": dict(tasks)}, bootstrap_iters=0,
                      log_samples=True)
    return {t: sorted(s, key=lambda x: x["doc_id"]) for t, s in out["samples"].items()}, out["results"]


def same_as_hf(ours: TaskResults, samples: dict, results: dict) -> float:
    "Largest difference of a log-likelihood; texts and metrics must be equal."
    worst = 0.
    for task in ours.tasks:
        items = ours.items[ours.items.task == task]
        assert len(items) == len(samples[task])
        for item, s in zip(items.itertuples(), samples[task]):
            if item.loglik: worst = max(worst, *(abs(a - b[0]) for a, b in zip(item.loglik, s["filtered_resps"], strict=True)))
            else: assert item.answer == s["filtered_resps"][0]
            assert item.metrics == {m: float(s[m]) for m in s["metrics"]}
        for m in ours.metrics[ours.metrics.task == task].itertuples(): assert m.value == results[task][f"{m.metric},none"]
    return worst


def some_neurons(v) -> NeuronSet: return NeuronSet([(0, i) for i in range(0, 40, 3)] + [(1, i) for i in range(1, 60, 4)], v.shape)


@pytest.fixture(scope="module")
def tasks():
    "The tasks with our items."
    return load_tasks(NAMES, DATA)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2", "gemma3", "bloom", "gpt2", "opt", "xglm"])
def test_tasks_log_likelihoods_equal_hf(arch, tasks):
    wide = dict(ffn_dim=128) if arch in ("opt", "xglm") else {}  # TransformerLens takes 4 d_model there
    hf, tok = tiny_model(arch, **wide)
    reference, _ = tiny_model(arch, **wide)
    ours = evaluate(load_model(hf, tokenizer=tok), tasks, batch_size=4, max_length=250, progress=False)
    assert same_as_hf(ours, *lm_eval_hf(reference, tok, tasks, max_length=250)) < 1e-3
    assert ours.work["saved"] > 0


def test_tasks_equal_hf_without_bos(tasks):
    hf, tok = tiny_model("qwen2", bos=False)
    reference, _ = tiny_model("qwen2", bos=False)
    two = {n: tasks[n] for n in ("xcopa_it", "xnli_vi")}
    assert same_as_hf(evaluate(load_model(hf, tokenizer=tok), two, progress=False), *lm_eval_hf(reference, tok, two)) < 1e-3


def test_tasks_few_shot_equals_hf():
    hf, tok = tiny_model("llama")
    reference, _ = tiny_model("llama")
    loaded = load_tasks("xcopa_it", DATA, num_fewshot=1)
    ours = evaluate(load_model(hf, tokenizer=tok), loaded, progress=False)
    assert ours.provenance["tasks"]["xcopa_it"]["num_fewshot"] == 1
    assert same_as_hf(ours, *lm_eval_hf(reference, tok, loaded)) < 1e-3
    none = evaluate(load_model(hf, tokenizer=tok), "xcopa_it", data_dir=DATA, progress=False)
    assert none.items.loglik.tolist() != ours.items.loglik.tolist()


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("by", [0., 3.])
def test_tasks_with_intervention_equal_a_pytorch_hook_in_hf(arch, by, tasks):
    hf, tok = tiny_model(arch)
    reference, _ = tiny_model(arch)
    model = load_model(hf, tokenizer=tok)
    some = some_neurons(view(model))
    edit = ablate(some) if by == 0 else amplify(some, by=by)
    ours, plain = evaluate(model, tasks, edit, progress=False), evaluate(model, tasks, progress=False)
    with by_hooks(reference, some, by): theirs = lm_eval_hf(reference, tok, tasks)
    assert same_as_hf(ours, *theirs) < 1e-3
    assert np.abs(np.concatenate(ours.items.loglik) - np.concatenate(plain.items.loglik)).max() > .1  # the edit does something
    assert same_as_hf(plain, *lm_eval_hf(tiny_model(arch)[0], tok, tasks)) < 1e-3  # and nothing of it stays


@pytest.mark.parametrize("by", [None, 0., 3.])
def test_tasks_generations_equal_hf(by):
    hf, tok = tiny_model("gemma3", max_position_embeddings=512)
    reference, _ = tiny_model("gemma3", max_position_embeddings=512)
    model, loaded = load_model(hf, tokenizer=tok), load_tasks(["xquad_en", "xquad_vi"], DATA)
    some = some_neurons(view(model))
    edit = Intervention() if by is None else ablate(some) if by == 0 else amplify(some, by=by)
    for t in loaded.values(): t.set_config("generation_kwargs", dict(until=["\n"], max_gen_toks=12, do_sample=False))
    ours = evaluate(model, loaded, edit, batch_size=2, progress=False)
    with by_hooks(reference, some, 1. if by is None else by): theirs = lm_eval_hf(reference, tok, loaded, batch_size=2)
    same_as_hf(ours, *theirs)
    assert len(ours.items) == 6 and (ours.items.answer.str.len() > 0).all()


@pytest.mark.parametrize("positions", ["prompt", "generated", "last"])
def test_tasks_positions_of_an_intervention_do_not_depend_on_sharing(positions):
    hf, tok = tiny_model("llama")
    v = view(load_model(hf, tokenizer=tok))
    edit = amplify(some_neurons(v), by=4.).where(positions)
    enc = lambda t: tok(t, add_special_tokens=False).input_ids
    pairs = [([1, *enc("the context of it")], enc(c)) for c in (" one", " other answers", " o")]
    pairs += [([1], enc("the context of all")), ([1, *enc("the context")], enc(" of it"))]
    alone, together, plain = {}, {}, {}
    for i, p in enumerate(pairs): score(v, [p], intervention=edit, done=lambda _, x, i=i: alone.__setitem__(i, x))
    score(v, pairs, intervention=edit, done=together.__setitem__)
    score(v, pairs, done=plain.__setitem__)
    np.testing.assert_allclose([together[i][0] for i in range(5)], [alone[i][0] for i in range(5)], atol=1e-3)
    assert max(abs(together[i][0] - plain[i][0]) for i in range(5)) > .1


def test_tasks_positions_split_at_the_continuation():
    "'prompt' and 'generated' edits, seen by hand: the logits of a token depend on the edits at the positions before it."
    hf, tok = tiny_model("llama")
    v = view(load_model(hf, tokenizer=tok))
    ids, n = [1, *range(10, 22)], 8
    some = some_neurons(v)
    def by_hand(first, last):
        def at(module, args):
            x = args[0].clone()
            x[:, first:last, cols[module]] = 0
            return (x,)
        cols = {b.mlp.down_proj: some.neurons_in(l) for l, b in enumerate(reference.model.layers)}
        handles = [m.register_forward_pre_hook(at) for m in cols]
        logp = reference(torch.tensor([ids])).logits.log_softmax(-1)[0]
        for h in handles: h.remove()
        return sum(logp[i - 1, ids[i]].item() for i in range(n, len(ids)))
    reference, _ = tiny_model("llama")
    for positions, where in dict(prompt=(0, n), generated=(n, len(ids)), last=(n - 1, len(ids)), all=(0, len(ids))).items():
        got = {}
        score(v, [(ids[:n], ids[n:])], intervention=ablate(some).where(positions), done=got.__setitem__)
        assert abs(got[0][0] - by_hand(*where)) < 1e-3, positions


def test_tasks_rows_longer_than_a_sliding_window_equal_hf(tasks):
    hf, tok = tiny_model("gemma3", sliding_window=16)
    reference, _ = tiny_model("gemma3", sliding_window=16)
    two = {n: tasks[n] for n in ("xcopa_it", "belebele_ita_Latn")}
    assert same_as_hf(evaluate(load_model(hf, tokenizer=tok), two, progress=False), *lm_eval_hf(reference, tok, two)) < 1e-3


def test_tasks_rows_shorter_and_longer_than_the_window_in_one_batch_equal_hf(tasks):
    hf, tok = tiny_model("gemma3", sliding_window=60)
    reference, _ = tiny_model("gemma3", sliding_window=60)
    some = {n: tasks[n] for n in ("xcopa_it", "xwinograd_en", "xnli_vi")}
    ours = evaluate(load_model(hf, tokenizer=tok), some, batch_size=64, progress=False)
    assert same_as_hf(ours, *lm_eval_hf(reference, tok, some)) < 1e-3 and ours.work["saved"] > 0


def test_tasks_many_rows_of_one_beginning_keep_to_the_batch_size():
    from langneuron_mi.measure.scoring import Row, _batches, _groups
    rows = [Row(i, (1, 2, 3, 4, 5, 6, 7, 8, i), 8, 7) for i in range(100)]
    groups = _groups(rows, lambda a, b: True, most=16)
    assert max(len(g) for _, g in groups) == 16 and sum(len(g) for _, g in groups) == 100
    assert max(sum(len(g) for _, g in b) for b in _batches(groups, 16)) == 16


def test_tasks_through_every_class_of_transformer_lens_equal_hf(tasks):
    one = {"xcopa_it": tasks["xcopa_it"]}
    for name, hf, tok, model in lens_models("llama"):
        ours = evaluate(model, one, max_length=120, progress=False)
        assert same_as_hf(ours, *lm_eval_hf(hf, tok, one, max_length=120)) < 1e-3, name


def test_tasks_rolling_log_likelihood_equals_hf():
    from types import SimpleNamespace
    from lm_eval.models.huggingface import HFLM
    hf, tok = tiny_model("llama")
    reference, _ = tiny_model("llama")
    texts = [SimpleNamespace(args=(t,)) for t in ("a short one", "a text that is longer than the context of the model " * 3)]
    ours = LangNeuronLM(load_model(hf, tokenizer=tok), max_length=32).loglikelihood_rolling(texts)
    theirs = HFLM(pretrained=reference, tokenizer=tok, max_length=32, batch_size=2).loglikelihood_rolling(texts)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_tasks_items_longer_than_the_context_are_counted_and_equal_hf(tasks):
    hf, tok = tiny_model("llama")
    reference, _ = tiny_model("llama")
    one = {"xcopa_it": tasks["xcopa_it"]}
    with pytest.warns(UserWarning, match="longer than the context of 40 tokens and were cut from the left"):
        ours = evaluate(load_model(hf, tokenizer=tok), one, max_length=40, progress=False)
    told = []
    import lm_eval.models.huggingface as module
    warn, module.eval_logger.warning = module.eval_logger.warning, lambda *a: told.append(a[0])
    try: theirs = lm_eval_hf(reference, tok, one, max_length=40)
    finally: module.eval_logger.warning = warn
    assert ours.metrics.truncated.tolist() == [len([t for t in told if "exceeds model's maximum length" in t])]
    assert ours.metrics.truncated[0] > 0
    assert same_as_hf(ours, *theirs) < 1e-3


def test_tasks_generation_longer_than_the_context_is_cut_as_in_hf():
    hf, tok = tiny_model("llama")
    reference, _ = tiny_model("llama")
    loaded = load_tasks("xquad_en", DATA)
    for t in loaded.values(): t.set_config("generation_kwargs", dict(until=["\n"], max_gen_toks=8, do_sample=False))
    with pytest.warns(UserWarning, match="3 requests are longer"):
        ours = evaluate(load_model(hf, tokenizer=tok), loaded, max_length=60, progress=False)
    same_as_hf(ours, *lm_eval_hf(reference, tok, loaded, max_length=60))


def test_tasks_other_interventions_never_find_each_others_answers(tmp_path, tasks):
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    some, one = some_neurons(view(model)), {"xcopa_it": tasks["xcopa_it"]}
    run = lambda edit: evaluate(model, one, edit, limit=3, out=tmp_path, progress=False)
    edits = [None, ablate(some), amplify(some, by=2.), amplify(some, by=3.), amplify(some, by=3.).where("prompt")]
    first = [run(e) for e in edits]
    assert all(r.work["kept"] == 0 and r.work["tokens"] > 0 for r in first)
    logliks = [tuple(np.concatenate(r.items.loglik)) for r in first]
    assert len(set(logliks)) == len(edits) and len(list(tmp_path.iterdir())) == len(edits)
    again = [run(e) for e in edits]
    assert all(r.work["tokens"] == 0 and r.work["kept"] == 6 for r in again)
    assert [tuple(np.concatenate(r.items.loglik)) for r in again] == logliks


def test_tasks_another_model_never_finds_the_answers(tmp_path, tasks):
    one = {"xcopa_it": tasks["xcopa_it"]}
    for seed in (0, 1):
        hf, tok = tiny_model("llama", seed=seed)
        assert evaluate(load_model(hf, tokenizer=tok), one, out=tmp_path, progress=False).work["kept"] == 0


def test_tasks_a_higher_limit_computes_only_new_items(tmp_path, tasks):
    hf, tok = tiny_model("llama")
    model, one = load_model(hf, tokenizer=tok), {"xcopa_it": tasks["xcopa_it"]}
    evaluate(model, one, limit=2, out=tmp_path, progress=False)
    more = evaluate(model, one, limit=4, out=tmp_path, progress=False)
    assert (more.work["kept"], len(more.items)) == (4, 4)
    assert evaluate(model, one, limit=4, num_fewshot=None, out=tmp_path, progress=False).work["tokens"] == 0


def test_tasks_fewer_examples_do_not_reuse_answers_of_more(tmp_path):
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    evaluate(model, "xcopa_it", data_dir=DATA, num_fewshot=1, out=tmp_path, progress=False)
    assert evaluate(model, "xcopa_it", data_dir=DATA, out=tmp_path, progress=False).work["kept"] == 0


def test_tasks_answers_are_kept_on_shared_storage(tasks):
    hf, tok = tiny_model("llama")
    model, one, out = load_model(hf, tokenizer=tok), {"xcopa_it": tasks["xcopa_it"]}, "memory://tasks-answers"
    first, again = (evaluate(model, one, limit=3, out=out, progress=False) for _ in range(2))
    assert (first.work["kept"], again.work["kept"], again.work["tokens"]) == (0, 6, 0)
    assert again.items.loglik.tolist() == first.items.loglik.tolist()
    with pytest.raises(TaskError, match="is no folder of this machine"): LangNeuronLM(model, out=out)


def test_tasks_answers_do_not_depend_on_the_parts_of_the_work(tasks, monkeypatch):
    from langneuron_mi.measure import task_model
    hf, tok = tiny_model("llama")
    model, two = load_model(hf, tokenizer=tok), {n: tasks[n] for n in ("xcopa_it", "xnli_vi")}
    whole = evaluate(model, two, batch_size=2, progress=False)
    monkeypatch.setattr(task_model, "_BATCHES", 1)
    parts = evaluate(model, two, batch_size=2, progress=False)
    np.testing.assert_allclose(np.concatenate(parts.items.loglik), np.concatenate(whole.items.loglik), atol=1e-4)
    assert parts.items.answer.tolist() == whole.items.answer.tolist() and parts.work["requests"] == whole.work["requests"]


_SLOW_RUN = """
import sys, time
from langneuron_mi.measure.answers import Kept
from langneuron_mi.measure.tasks import evaluate
from langneuron_mi.models.loading import load_model
from langneuron_mi.testing.tiny import tiny_model
hf, tok = tiny_model("llama")
inner = Kept.put
def put(self, key, value):
    self.every = 0
    inner(self, key, value)
    print("kept", flush=True)
    time.sleep(.5)
Kept.put = put
evaluate(load_model(hf, tokenizer=tok), "xcopa_it", data_dir=sys.argv[1], batch_size=1, out=sys.argv[2], progress=False)
"""


@pytest.mark.slow
def test_tasks_a_killed_evaluation_resumes_item_by_item(tmp_path):
    p = subprocess.Popen([sys.executable, "-c", _SLOW_RUN, str(DATA), str(tmp_path)], stdout=subprocess.PIPE, text=True,
                         env=os.environ | dict(PYTHONPATH=str(Path(__file__).parents[2])))
    for _ in range(3): assert p.stdout.readline() == "kept\n"
    p.send_signal(signal.SIGKILL)
    p.wait()
    kept = sum(len(json.loads(f.read_text())) for f in tmp_path.glob("*/items-*.json"))
    assert 3 <= kept < 8
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    resumed = evaluate(model, "xcopa_it", data_dir=DATA, out=tmp_path, progress=False)
    assert resumed.work["kept"] == kept and resumed.work["requests"] == 8
    whole = evaluate(model, "xcopa_it", data_dir=DATA, progress=False)
    np.testing.assert_allclose(np.concatenate(resumed.items.loglik), np.concatenate(whole.items.loglik), atol=1e-4)


def test_tasks_what_was_computed_survives_an_error(tmp_path, tasks, monkeypatch):
    hf, tok = tiny_model("llama")
    model, one, calls = load_model(hf, tokenizer=tok), {"xcopa_it": tasks["xcopa_it"]}, []
    inner = Kept.put
    def put(self, key, value):
        inner(self, key, value)
        calls.append(key)
        if len(calls) == 5: raise KeyboardInterrupt
    monkeypatch.setattr(Kept, "put", put)
    with pytest.raises(KeyboardInterrupt): evaluate(model, one, batch_size=1, out=tmp_path, progress=False)
    monkeypatch.undo()
    assert evaluate(model, one, out=tmp_path, progress=False).work["kept"] == 5
    assert not view(model).active


def test_tasks_hooks_are_gone_after_an_error_and_others_hooks_stay(tasks):
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    v, seen = view(model), []
    count = lambda: sum(len(v.point(l, k).fwd_hooks) for l in range(v.n_layers) for k in ("pre", "pre_linear", "post"))
    with v.hooks([(0, "post", lambda x: seen.append(1))]):
        evaluate(model, {"xcopa_it": tasks["xcopa_it"]}, ablate(some_neurons(v)), progress=False)
        assert count() == 1 and seen
    lm = LangNeuronLM(model, ablate(some_neurons(v)))
    with pytest.raises(TaskError, match="no tokens"): lm._loglikelihood_tokens([(("", ""), [], [3])])
    assert count() == 0


def test_tasks_refuse_a_model_that_an_open_intervention_changed(tasks):
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    with ablate(some_neurons(view(model))).on(model):
        with pytest.raises(ValueError, match="untouched"): evaluate(model, {"xcopa_it": tasks["xcopa_it"]}, progress=False)
        with pytest.raises(ValueError, match="untouched"): LangNeuronLM(model)._loglikelihood_tokens([(("a", "b"), [1], [3])])


def test_tasks_refuse_neurons_of_another_model(tasks):
    hf, tok = tiny_model("llama")
    with pytest.raises(ValueError, match="2 layers × 99"): LangNeuronLM(load_model(hf, tokenizer=tok), ablate(NeuronSet([(0, 1)], (2, 99))))


def test_tasks_model_is_registered_with_lm_eval(tmp_path):
    from lm_eval.api.registry import get_model
    assert get_model("langneuron") is LangNeuronLM
    hf, tok = tiny_model("llama")
    hf.save_pretrained(tmp_path/"m")
    tok.save_pretrained(tmp_path/"m")
    v = view(load_model(str(tmp_path/"m")))
    some = some_neurons(v)
    LanguageNeurons({"it": some, "en": NeuronSet([(0, 1)], v.shape)}, method="test").save(tmp_path/"n.safetensors")
    lm = LangNeuronLM.create_from_arg_string(f"pretrained={tmp_path/'m'},neurons={tmp_path/'n.safetensors'},lang=it,edit=x2",
                                             dict(batch_size="2", max_batch_size=None, device="cpu"))
    assert lm.intervention.name == f"amplify {len(some)} by 2" and lm.batch_size == 2
    assert "intervention" in lm.kept.about


def test_tasks_entry_point_is_declared():
    text = (Path(__file__).parents[2]/"setup.py").read_text()
    assert "lm_eval.models" in text and "langneuron_mi.measure.task_model:LangNeuronLM" in text


def test_tasks_results_survive_the_disk(tmp_path, tasks):
    hf, tok = tiny_model("llama")
    r = evaluate(load_model(hf, tokenizer=tok), {n: tasks[n] for n in ("xcopa_it", "belebele_ita_Latn")}, progress=False)
    back = TaskResults.load(r.save(tmp_path/"r.safetensors"))
    pd.testing.assert_frame_equal(back.items[sorted(back.items)], r.items[sorted(r.items)], check_dtype=False)
    pd.testing.assert_frame_equal(back.to_df(), r.to_df())
    assert "xcopa_it" in r._repr_markdown_() and len(r.plot().data) == 2
    assert set(r.to_df().metric) == {"acc", "acc_norm"} and r.to_df().lang.tolist() == ["it"] * 3


def test_tasks_answers_do_not_depend_on_batch_size(tasks):
    hf, tok = tiny_model("gemma2")
    model = load_model(hf, tokenizer=tok)
    a, b = (evaluate(model, tasks, batch_size=n, progress=False) for n in (1, 64))
    np.testing.assert_allclose(np.concatenate(a.items.loglik), np.concatenate(b.items.loglik), atol=1e-3)
    assert a.items.answer.tolist() == b.items.answer.tolist()


# --- data -----------------------------------------------------------------------------------------------------------

def test_task_data_layouts(tmp_path):
    row = json.dumps(dict(a=1)) + "\n"
    config = dict(dataset_path="x/xcopa", dataset_name="it", test_split="test", validation_split="validation")
    for i, name in enumerate(["xcopa/test.it.jsonl", "xcopa/it.test.jsonl", "xcopa/it/test.jsonl", "xcopa_it/test.jsonl", "test.it.jsonl",
                              "xcopa/it.jsonl", "xcopa/it/test-00000-of-00001.jsonl", "it/test.jsonl", "xcopa_it.jsonl"]):
        root = tmp_path/str(i)
        (root/name).parent.mkdir(parents=True)
        (root/name).write_text(row)
        assert find_files("xcopa_it", config, root) == {"test": [root/name]}, name
    assert find_files("xcopa_id", config | dict(dataset_name="id"), tmp_path/"0") == {}


def test_task_data_shards_are_read_in_order(tmp_path):
    (tmp_path/"xcopa/it").mkdir(parents=True)
    rows = read_rows(DATA/"xcopa/test.it.jsonl")
    for i in (1, 0): pd.DataFrame(rows[2 * i:2 * i + 2]).to_parquet(tmp_path/f"xcopa/it/test-0000{i}-of-00002.parquet")
    assert [d["premise"] for d in load_tasks("xcopa_it", tmp_path)["xcopa_it"].eval_docs] == [r["premise"] for r in rows]


def test_task_data_squad_form_becomes_rows():
    docs = load_tasks("xquad_vi", DATA)["xquad_vi"].eval_docs
    assert len(docs) == 3 and docs[1]["answers"] == dict(text=["1820"], answer_start=[docs[1]["context"].index("1820")])


@pytest.mark.parametrize("name, n", [("xwinograd_jp", 2), ("xnli_vi", 3), ("belebele_ita_Latn", 2), ("include_base_44_italian_stem", 2),
                                     ("xcopa_id", 4)])
def test_task_data_of_every_benchmark_is_found(name, n):
    assert len(load_tasks(name, DATA)[name].eval_docs) == n


def test_task_data_explicit_files(tmp_path):
    files = {"xcopa_it": {"test": [str(DATA/"xcopa/test.it.jsonl"), DATA/"xcopa/test.id.jsonl"]}}
    assert len(load_tasks("xcopa_it", files)["xcopa_it"].eval_docs) == 8
    with pytest.raises(TaskError, match="evaluated on the split 'test'"):
        load_tasks("xcopa_it", {"xcopa_it": {"validation": DATA/"xcopa/val.it.jsonl"}})
    with pytest.raises(TaskError, match="no file .*gone.jsonl"): load_tasks("xcopa_it", {"xcopa_it": tmp_path/"gone.jsonl"})
    (tmp_path/"empty.jsonl").write_text("\n")
    with pytest.raises(TaskError, match="holds no rows"): load_tasks("xcopa_it", {"xcopa_it": tmp_path/"empty.jsonl"})
    (tmp_path/"broken.jsonl").write_text("{")
    with pytest.raises(TaskError, match="cannot be read"): load_tasks("xcopa_it", {"xcopa_it": tmp_path/"broken.jsonl"})


def one_line(e) -> bool: return "\n" not in str(e.value) and len(str(e.value)) < 600


def test_task_data_missing_local_data():
    with pytest.raises(TaskError, match="no local data for the task 'xcopa_th'.*xcopa/test.th.jsonl") as e: load_tasks("xcopa_th", DATA)
    assert one_line(e)
    with pytest.raises(TaskError, match="is no folder"): load_tasks("xcopa_th", DATA/"nowhere")


def test_task_data_hub_out_of_reach():
    with pytest.raises(TaskError, match="'cambridgeltl/xcopa'.*cannot be read from the hub.*data_dir") as e: load_tasks("xcopa_it")
    assert one_line(e)


def test_task_data_gated_dataset(monkeypatch):
    import datasets
    said = "Dataset 'facebook/belebele' is a gated dataset on the Hub. You must be authenticated to access it."
    def refuse(*a, **k): raise datasets.exceptions.DatasetNotFoundError(said)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(TaskError, match="is gated: accept its terms at https://huggingface.co/datasets/facebook/belebele") as e:
        load_tasks("belebele_ita_Latn")
    assert one_line(e)


def test_task_data_unknown_task_names_the_nearest():
    with pytest.raises(TaskError, match="no task 'xcopa_itt'; did you mean 'xcopa_it'") as e: task_names(["xcopa_itt"])
    assert one_line(e)
    with pytest.raises(TaskError, match="no task matches"): task_names("nothing_like_*")


@pytest.mark.slow  # lm-eval's whole index
def test_task_data_tags():
    assert {"xquad_en", "xquad_vi"} <= set(task_names("xquad"))


def test_task_data_groups_and_patterns():
    assert task_names("xcopa") == [f"xcopa_{l}" for l in "et ht id it qu sw ta th tr vi zh".split()]
    assert task_names("xwinograd_[ej]*") == ["xwinograd_en", "xwinograd_jp"]


def test_task_data_rows_of_another_schema():
    with pytest.raises(TaskError, match="do not have its schema") as e:
        load_tasks("belebele_ita_Latn", {"belebele_ita_Latn": DATA/"xcopa/test.it.jsonl"})
    assert one_line(e)


def test_task_data_a_filter_that_leaves_nothing():
    with pytest.raises(TaskError, match="no items for the task"): load_tasks("include_base_44_italian_social_science", DATA)


def test_tasks_bad_limit_and_batch_size(tasks):
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    for limit in (0, -3):
        with pytest.raises(TaskError, match="limit is a number of items"): evaluate(model, tasks, limit=limit, progress=False)
    with pytest.raises(TaskError, match="batch_size is 1 or more"): evaluate(model, tasks, batch_size=-1, progress=False)
    with pytest.raises(TaskError, match="both neurons="): LangNeuronLM(model, lang="it")


def test_tasks_without_lm_eval_name_the_extra():
    code = "import sys; sys.modules['lm_eval'] = None\nimport langneuron_mi\ntry: langneuron_mi.evaluate\nexcept ImportError as e: print(e)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env=os.environ | dict(PYTHONPATH=str(Path(__file__).parents[2])))
    assert 'pip install "langneuron_mi[eval]"' in out.stdout
