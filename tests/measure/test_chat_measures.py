"Chat: steering, translation and lm-eval's tasks, against the template's own ids in Hugging Face's model and lm-eval's own `hf`."
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from chats import BOS, LLAMA2, NO_SYSTEM, TURNS, chat_models, chat_tokenizer, template_ids

from langneuron_mi.change.interventions import ablate, set_to
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.measure.continuations import tokenize
from langneuron_mi.measure.facts import Fact
from langneuron_mi.measure.pairs import load_pairs
from langneuron_mi.measure.probes import Probes
from langneuron_mi.measure.scoring import score
from langneuron_mi.measure.steering import lss
from langneuron_mi.measure.task_data import load_tasks
from langneuron_mi.measure.task_matrix import evaluate_matrix
from langneuron_mi.measure.task_model import LangNeuronLM
from langneuron_mi.measure.tasks import evaluate
from langneuron_mi.measure.translation import build_prompts, translate
from langneuron_mi.measure.translation_matrix import translation_table
from langneuron_mi.models.chat import Asking
from langneuron_mi.models.view import view
from langneuron_mi.testing.tiny import tiny_model
from langneuron_mi.text.conversations import ChatError

DATA = Path(__file__).parents[1]/"data"/"tasks"
NAMES = {"de": ["Berlin", "Rom", "Paris"], "en": ["Berlin!", "Rome", "Parigi"]}
FACTS = [Fact(f"f{i}", "capital", {l: (s, NAMES[l][i]) for l in ("de", "en")}) for i, s in enumerate(["DE", "IT", "FR"])]
PROBES = Probes(tuple(FACTS), {"capital": {"en": "The capital of [X] is [Y]", "de": "Hauptstadt von [X]: [Y]"}}, ("de", "en"), "toy")
SETS = {l: NeuronSet([(0, i) for i in range(k, 40, 5)] + [(1, k), (1, k + 9)], (2, 64)) for k, l in enumerate(("de", "en"))}


@torch.no_grad()
def log_prob(hf, before, after):
    "Log-probability of token ids after others."
    rows = hf(torch.tensor([before + after])).logits[0].float().log_softmax(-1)
    return float(sum(rows[len(before) - 1 + i, t] for i, t in enumerate(after)))


@pytest.mark.parametrize(("template", "gap"), [(BOS, ""), (LLAMA2, " ")])
def test_chat_steering_scores_are_those_of_answers_after_the_template(template, gap, tmp_path):
    for c in chat_models(template):
        asked = dict(controls=0, progress=False, targets=["de"], out=tmp_path/c.kind)
        factor = {"set": lambda n, lang: set_to(n, 1.)}
        s = lss(c.model, SETS, PROBES, factor, chat=True, system="Sei kurz.", **asked)
        items = s.items.set_index("fact")
        for f in FACTS:
            before = template_ids(c.tok, f"The capital of {f.labels['en'][0]} is", "Sei kurz.")
            for column, lang in (("base_before", "en"), ("target_before", "de")):
                answer = c.tok(gap + f.labels[lang][1], add_special_tokens=False).input_ids
                assert items.loc[f.id, column] == pytest.approx(log_prob(c.hf, before, answer), abs=1e-3), (c.kind, column)
        assert s.counts.n_merged.tolist() == [0] and s.provenance["chat"]["system"] == "Sei kurz."
        plain = lss(c.model, SETS, PROBES, factor, **asked)
        assert (plain.items.base_before - s.items.base_before).abs().min() > .01 and "chat" not in plain.provenance
        again = lss(c.model, SETS, PROBES, factor, chat=True, system="Sei kurz.", **asked)
        assert again.work["from_cache"] and again.items.equals(s.items)


def test_chat_steering_at_generated_tokens_leaves_the_answers_first_token():
    for c in chat_models(BOS):
        v = view(c.model)
        long = "Eine Frage, die laenger ist"
        rows = tokenize(v, ["Ja?", long], [["Ja? a", "Ja? b"], [f"{long}: c"]], Asking(chat=True))
        pairs = [(r.prefix, x) for r in rows for x in r.rest]
        def scores(i):
            got = {}
            score(v, pairs, intervention=i, placed=True, done=lambda k, a: got.__setitem__(k, a[0]))
            return [got[k] for k in range(len(pairs))]
        plain, edit = scores(set_to(NeuronSet([], (2, 64)), 1.)), set_to(SETS["de"], 2.)
        assert [len(x) for _, x in pairs] == [1, 1, 3]
        generated = scores(edit.where("generated"))
        assert generated[:2] == pytest.approx(plain[:2], abs=1e-5) and abs(generated[2] - plain[2]) > 1e-3
        assert all(abs(a - b) > 1e-3 for a, b in zip(scores(edit.where("last")), plain))


def test_chat_texts_that_do_not_continue_their_prompt_are_refused():
    v = view(chat_models(BOS)[0].model)
    for texts, words in [(["Nein."], "adds nothing"), (["Ja? "], "adds nothing"), (["Ja?" + "x"*300], "the context of")]:
        with pytest.raises(ValueError, match=words): tokenize(v, ["Ja?"], [texts], Asking(chat=True))


# translation

PAIRS = dict(en=["a b", "c", "d e f g"], de=["x", "y", "z"])


def test_chat_translation_equals_hugging_face_after_the_template(tmp_path):
    pairs = load_pairs(PAIRS, "en", "de", examples=0)
    for c in chat_models(BOS):
        v, out = view(c.model), tmp_path/c.kind
        asked = dict(prompt="{source} =", max_new_tokens=8, progress=False)
        def want(system):
            for p in build_prompts(pairs, "{source} ="):
                row = torch.tensor([template_ids(c.tok, p, system)])
                text = c.hf.generate(row, do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=[2, 263])[0, row.shape[1]:]
                yield " ".join(c.tok.decode(text, skip_special_tokens=True).split("\n")[0].split())
        plain = translate(c.model, pairs, out=out, **asked)
        for system in (None, "Sei kurz."):
            for batch_size in (1, 3):
                t = translate(c.model, pairs, chat=True, system=system, out=out, batch_size=batch_size, **asked)
                assert t.hypotheses == [*want(system)] != plain.hypotheses, c.kind
                assert t.provenance["chat"]["system"] == system
        assert translate(c.model, pairs, out=out, **asked).hypotheses == plain.hypotheses and "chat" not in plain.provenance
        with ablate(SETS["de"]).on(c.model): edited = v.generate(Asking(chat=True).put(v, build_prompts(pairs, "{source} =")), 8)
        got = translate(c.model, pairs, ablate(SETS["de"]), chat=True, out=out, **asked).hypotheses
        assert got == [" ".join(t.split("\n")[0].split()) for t in edited]
        with pytest.raises(ValueError, match="has .* tokens, and 100 more are to come"):
            translate(c.model, pairs, chat=True, system="x"*(v.n_ctx - 90), max_new_tokens=100, progress=False)


@pytest.mark.filterwarnings("ignore:nothing is known")
def test_chat_translation_tables_ask_every_prompt_alike():
    pairs, c = load_pairs(PAIRS, "en", "de", examples=0), chat_models(BOS)[0]
    asked = dict(prompt="{source} =", max_new_tokens=4, chat=True, progress=False)
    table = translation_table(c.model, pairs, SETS, lambda n, lang: ablate(n), others=None, controls=0, **asked)
    assert table["de", "own"].hypotheses == translate(c.model, pairs, ablate(SETS["de"]), **asked).hypotheses
    assert table.provenance["chat"] == table["de", "none"].provenance["chat"]


# lm-eval

def lm_eval_hf(c, tasks, **kwargs):
    "Samples of lm-eval's own evaluation of its own `hf` model, in chat."
    from lm_eval.evaluator import evaluate as lm_evaluate
    from lm_eval.models.huggingface import HFLM
    for t in tasks.values(): t.set_fewshot_seed(seed=1234)
    out = lm_evaluate(HFLM(pretrained=c.hf, tokenizer=c.tok, batch_size=2, max_length=120), {"tasks": dict(tasks)}, bootstrap_iters=0,
                      log_samples=True, apply_chat_template=True, **kwargs)
    return {t: sorted(s, key=lambda x: x["doc_id"]) for t, s in out["samples"].items()}


def worst(ours, samples):
    "Largest difference of a log-likelihood."
    found = []
    for task in ours.tasks:
        for item, s in zip(ours.items[ours.items.task == task].itertuples(), samples[task], strict=True):
            found += [abs(a - b[0]) for a, b in zip(item.loglik, s["filtered_resps"], strict=True)]
    return max(found)


@pytest.mark.filterwarnings("ignore:.*longer than the context")
@pytest.mark.parametrize(("template", "bos", "system"), [(BOS, True, None), (BOS, True, "Sei kurz."), (TURNS, False, None),
                                                         (TURNS, True, None), (LLAMA2, True, "Sei kurz.")])
def test_chat_tasks_equal_lm_evals_own_model(template, bos, system):
    for c in chat_models(template, bos):
        tasks = load_tasks(["xcopa_it", "xnli_vi"], DATA)
        ours = evaluate(c.model, tasks, chat=True, system=system, max_length=120, batch_size=4, progress=False)
        assert worst(ours, lm_eval_hf(c, tasks, system_instruction=system)) < 1e-3, c.kind
        plain = evaluate(c.model, tasks, max_length=120, progress=False)
        assert worst(plain, {t: [dict(filtered_resps=[(x,) for x in r.loglik]) for r in ours.items[ours.items.task == t].itertuples()]
                             for t in ours.tasks}) > .1
        assert ours.provenance["chat"]["system"] == system and "chat" not in plain.provenance


def test_chat_tasks_are_fed_one_bos():
    for c in chat_models(BOS):
        lm, seen = LangNeuronLM(c.model), []
        text = lm.apply_chat_template([dict(role="user", content="Ja?")])
        assert lm.tok_encode(text) == template_ids(c.tok, "Ja?") and text.startswith("<bos>")
        keep = lambda x: seen.append(x.shape[1])
        with view(c.model).hooks([(0, "pre", keep)]):
            lm.generate_until([type("R", (), dict(args=(text, dict(until=["zzz"], max_gen_toks=2, do_sample=False))))])
        assert seen[0] == len(template_ids(c.tok, "Ja?")), c.kind  # a BOS more, where a written template is fed as a plain text


def test_chat_generated_answers_to_tasks_equal_lm_evals():
    from lm_eval.models.huggingface import HFLM
    for c in chat_models(BOS):
        lm = LangNeuronLM(c.model)
        said = [lm.apply_chat_template([dict(role="user", content=p)]) for p in ("Ja?", "Wirklich, ist das so?", "a")]
        ask = lambda: [type("R", (), dict(args=(t, dict(until=["\n"], max_gen_toks=6, do_sample=False)))) for t in said]
        c.hf.generation_config.eos_token_id = [2, 263]  # as a chat model's own says; ours reads it from the template
        assert lm.generate_until(ask()) == HFLM(pretrained=c.hf, tokenizer=c.tok, batch_size=2).generate_until(ask()), c.kind


def test_chat_tasks_places_start_where_the_template_says():
    "lm-eval moves the white space that a template ends with into the continuation; it stays a part of the prompt."
    for c in chat_models(BOS):
        edit = set_to(SETS["de"], 2.)
        text = LangNeuronLM(c.model).apply_chat_template([dict(role="user", content="Ja?")])
        ask = [type("R", (), dict(args=(text, answer))) for answer in ("a", "b", "cd")]
        got = {p: LangNeuronLM(c.model, edit.where(p)) for p in ("generated", "prompt", "all", "last")}
        for lm in got.values(): lm.apply_chat_template([dict(role="user", content="x")])
        plain = [x for x, _ in LangNeuronLM(c.model).loglikelihood(ask)]
        rows = {p: [x for x, _ in lm.loglikelihood(ask)] for p, lm in got.items()}
        assert rows["generated"][:2] == pytest.approx(plain[:2], abs=1e-4) and abs(rows["generated"][2] - plain[2]) > 1e-3
        assert rows["prompt"][:2] == pytest.approx(rows["all"][:2], abs=1e-4), c.kind
        before, v = template_ids(c.tok, "Ja?"), view(c.model)
        one = before + c.tok("cd", add_special_tokens=False).input_ids
        with v.at(len(before)), edit.where("last").on(c.model): logits = v.logits(torch.tensor([one])).float().log_softmax(-1)[0].detach()
        want = sum(float(logits[i - 1, one[i]]) for i in range(len(before) - 1, len(one)))  # the newline is scored, as in lm-eval
        assert rows["last"][2] == pytest.approx(want, abs=1e-3)


def test_chat_tasks_without_a_system_role():
    c = chat_models(NO_SYSTEM)[0]
    tasks = load_tasks(["xcopa_it"], DATA)
    with pytest.raises(ChatError, match="takes no system message"): evaluate(c.model, tasks, chat=True, system="a", progress=False)
    for t in tasks.values(): t.set_config("description", "Wähle.")
    with pytest.warns(UserWarning, match="the task's description is left out of . prompts, as lm-eval does"):
        ours = evaluate(c.model, tasks, chat=True, max_length=120, progress=False)
    assert worst(ours, lm_eval_hf(c, tasks)) < 1e-3
    c.tok.chat_template = view(c.model).tokenizer.chat_template = None
    with pytest.raises(ChatError, match="has no chat template"): evaluate(c.model, tasks, chat=True, progress=False)


def test_chat_answers_to_tasks_are_kept_apart_from_plain_ones(tmp_path):
    c, tasks = chat_models(BOS)[0], load_tasks(["xcopa_it"], DATA)
    asked = dict(out=tmp_path, max_length=120, progress=False)
    first = [evaluate(c.model, tasks, **asked), evaluate(c.model, tasks, chat=True, **asked)]
    again = [evaluate(c.model, tasks, **asked), evaluate(c.model, tasks, chat=True, **asked)]
    assert [r.work["kept"] for r in again] == [r.work["requests"] for r in first] and [r.work["kept"] for r in first] == [0, 0]
    for a, b in zip(first, again): assert a.items.loglik.tolist() == b.items.loglik.tolist()
    matrix = evaluate_matrix(c.model, tasks, {"it": SETS["de"]}, chat=True, controls=0, **asked)
    scores = evaluate(c.model, tasks, ablate(SETS["de"]), chat=True, **asked).scores("xcopa_it")
    assert np.array_equal(matrix.scores["own", "it", "xcopa_it"], scores) and matrix.provenance["chat"]


def test_chat_template_option_of_lm_evals_command_line(tmp_path):
    from lm_eval.models.huggingface import HFLM
    hf, _ = tiny_model("llama", vocab_size=264)
    hf.save_pretrained(tmp_path/"model")
    tok = chat_tokenizer(BOS)
    tok.save_pretrained(tmp_path/"model")
    files = dict(data_files=dict(test=str(tmp_path/"toy.jsonl")))
    (tmp_path/"toy.yaml").write_text(json.dumps(dict(
        task="toy", dataset_path="json", dataset_kwargs=files, test_split="test", output_type="multiple_choice", doc_to_text="{{q}}",
        doc_to_choice=["ja", "nein"], doc_to_target=0, metric_list=[dict(metric="acc")])))
    (tmp_path/"toy.jsonl").write_text("".join(json.dumps(dict(q=q)) + "\n" for q in ("Ist das so?", "Und das?")))
    code = "import langneuron_mi.measure.task_model; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    run = subprocess.run([sys.executable, "-c", code, "--model", "langneuron", "--model_args", f"pretrained={tmp_path/'model'}", "--tasks",
                          "toy", "--include_path", str(tmp_path), "--apply_chat_template", "--log_samples", "--output_path",
                          str(tmp_path/"out"), "--device", "cpu"], capture_output=True, cwd=tmp_path, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [json.loads(l) for l in next((tmp_path/"out").rglob("samples_toy*.jsonl")).read_text().splitlines()]
    asked = [tuple(x.values()) for l in sorted(lines, key=lambda l: l["doc_id"]) for x in l["arguments"].values()]
    assert asked[0] == ("<bos><|user|>\nIst das so?<|end|>\n<|assistant|>\n", "ja")
    want = HFLM(pretrained=hf, tokenizer=tok).loglikelihood([type("R", (), dict(args=a)) for a in asked])
    got = [float(x[0][0]) for l in sorted(lines, key=lambda l: l["doc_id"]) for x in l["resps"]]
    assert np.allclose(got, [x for x, _ in want], atol=1e-3)
