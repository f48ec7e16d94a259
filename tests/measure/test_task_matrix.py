"Task matrices: against hand-made sums, scipy's exact test, and a model whose language neurons are known by construction."
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats as sp

from langneuron_mi.cli import main
from langneuron_mi.figures.look import figure_html
from langneuron_mi.change.interventions import ablate, amplify
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.find.language_neurons import LanguageNeurons
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.measure.task_data import TaskError, load_tasks
from langneuron_mi.measure.task_matrix import NONE, TaskMatrix, change_matrices, evaluate_matrix, task_rows
from langneuron_mi.testing.planted import planted_model
from langneuron_mi.testing.tiny import tiny_model

DATA = Path(__file__).parents[1]/"data"/"tasks"  # a few items written by us: see the README there
LANGS = ("it", "id", "sw")


def toy(n=60, seed=0) -> TaskMatrix:
    "Random accuracies: own neurons spoil their own language, random ones a little of everything."
    draw = np.random.default_rng(seed)
    base = {l: draw.random(n) < .6 for l in LANGS}
    hurt = lambda l, share: np.where(draw.random(n) < share, False, base[l])
    scores = {(*NONE, f"xcopa_{l}"): b for l, b in base.items()}
    scores |= {(k, of, f"xcopa_{l}"): hurt(l, .4 if k == "own" and of == l else .05)
               for k in ("own", "random 0", "random 1") for of in LANGS for l in LANGS}
    return TaskMatrix({k: x.astype(float) for k, x in scores.items()}, {f"xcopa_{l}": l for l in LANGS}, "acc")


def planted_tasks(folder: Path, planted):
    "A next-word task for each toy language, and its files."
    row = lambda w: dict(word=w, right=planted.successor(w), wrong=planted.successor(planted.successor(w)))
    names, files = [], {}
    for lang in planted.langs:
        (folder/f"word_{lang}.yaml").write_text(
            f"task: word_{lang}\ndataset_path: words\ndataset_name: {lang}\noutput_type: multiple_choice\ntest_split: test\n"
            "doc_to_text: \"{{word}}\"\ndoc_to_choice: \"{{[wrong, right]}}\"\ndoc_to_target: 1\n"
            "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n")
        (folder/f"{lang}.jsonl").write_text("\n".join(json.dumps(row(f"{lang}{i}")) for i in range(planted.n_words)))
        names, files = names + [str(folder/f"word_{lang}.yaml")], files | {f"word_{lang}": folder/f"{lang}.jsonl"}
    return names, files


def test_task_matrix_cells_equal_hand_made_sums():
    m = toy()
    df = m.to_df().set_index(["kind", "neurons_of", "task"])
    assert len(df) == 27
    for (kind, of, task), r in df.iterrows():
        new, old = m.scores[kind, of, task], m.scores[*NONE, task]
        assert np.isclose(r.change, new.mean() - old.mean()) and np.isclose(r.score, new.mean()) and np.isclose(r.base, old.mean())
        gained, lost = int((new > old).sum()), int((new < old).sum())
        assert (r.gained, r.lost, r.n) == (gained, lost, 60)
        assert np.isclose(r.p, sp.binomtest(gained, gained + lost).pvalue if gained + lost else 1)
        assert r.low <= r.change <= r.high and r.p_holm >= r.p - 1e-12


def test_task_matrix_interval_is_that_of_the_paired_change():
    m = toy()
    r = m.to_df().set_index(["kind", "neurons_of", "task"]).loc["own", "it", "xcopa_it"]
    d = m.changes("own", "it", "xcopa_it")
    half = 1.96*d.std(ddof=1)/np.sqrt(len(d))
    assert abs(r.low - (d.mean() - half)) < .04 and abs(r.high - (d.mean() + half)) < .04
    unpaired = 1.96*np.sqrt(m.scores["own", "it", "xcopa_it"].var()/60 + m.scores[*NONE, "xcopa_it"].var()/60)
    assert r.high - r.low < 2*unpaired


def test_task_matrix_headline_is_the_mean_of_self_and_of_cross_cells():
    m = toy()
    df, h = m.to_df(), m.headline().set_index(["kind", "where"])
    own, rand = df[df.kind == "own"], df[df.kind.str.startswith("random")]
    assert np.isclose(h.change["own", "self"], own[own.neurons_of == own.lang].change.mean())
    assert np.isclose(h.change["own", "cross"], own[own.neurons_of != own.lang].change.mean())
    assert np.isclose(h.change["random", "self"], rand[rand.neurons_of == rand.lang].change.mean())
    assert np.isclose(h.change["own - random", "self"], h.change["own", "self"] - h.change["random", "self"])
    assert np.isclose(h.change["own", "self - cross"], h.change["own", "self"] - h.change["own", "cross"])
    assert h.high["own - random", "self"] < 0 < h.high["own - random", "cross"] + .05
    assert (h.low <= h.change).all() and (h.change <= h.high).all()


def test_task_matrix_headline_takes_a_parallel_item_in_all_its_languages_at_once():
    "If all languages change on the same items, three languages are no more evidence than one."
    d = np.repeat([1., 0.], [20, 40])
    cells = {(*NONE, f"xcopa_{l}"): np.zeros(60) for l in LANGS} | {("own", l, f"xcopa_{l}"): d for l in LANGS}
    three = TaskMatrix(cells, {f"xcopa_{l}": l for l in LANGS}, "acc").headline().iloc[0]
    one = TaskMatrix({k: x for k, x in cells.items() if k[2] == "xcopa_it"}, {"xcopa_it": "it"}, "acc").headline().iloc[0]
    assert np.isclose(three.high - three.low, one.high - one.low, rtol=.05)


def test_task_matrix_tasks_of_different_length():
    cells = {(*NONE, "a_it"): np.zeros(30), (*NONE, "a_id"): np.zeros(10), ("own", "it", "a_it"): np.ones(30),
             ("own", "id", "a_id"): np.zeros(10)}
    h = TaskMatrix(cells, {"a_it": "it", "a_id": "id"}, "acc").headline().iloc[0]
    assert np.isclose(h.change, .5) and h["where"] == "self" and h.tasks == 2


def test_task_matrix_of_the_planted_model_is_diagonal(tmp_path):
    planted = planted_model()
    model = load_model(planted.hf, tokenizer=planted.tokenizer)
    sets = LanguageNeurons({l: NeuronSet(n, view(model).shape) for l, n in planted.neurons.items()}, method="planted")
    names, files = planted_tasks(tmp_path, planted)
    m = evaluate_matrix(model, names, sets, data_dir=files, controls=2, out=tmp_path/"cache", progress=False)
    own = m.to_df().query("kind == 'own'")
    assert (own.base == 1).all()
    assert np.allclose(own.change, np.where(own.neurons_of == own.lang, -1, 0))
    h = m.headline().set_index(["kind", "where"])
    assert h.change["own", "self"] == -1 and h.high["own - random", "self"] < -.8
    assert m.kinds == ["own", "random 0", "random 1"]
    assert any("Accuracy changed by -100.0 points" in s for s in m.sentences())
    assert set(m.provenance["interventions"]) == {f"{k} {l}" for k in m.kinds for l in planted.langs} and not view(model).active


def test_task_matrix_random_sets_have_equal_sizes_per_layer_and_are_seeded():
    v = view(load_model((t := tiny_model("llama"))[0], tokenizer=t[1]))
    own = {"it": NeuronSet([(0, i) for i in range(5)] + [(1, 3)], v.shape), "id": NeuronSet([(1, i) for i in range(9)], v.shape)}
    rows = task_rows(own, "x2", controls=3)
    assert list(rows) == [("own", "it"), ("own", "id")] + [(f"random {i}", l) for i in range(3) for l in own]
    for (kind, lang), i in rows.items():
        assert i.edits[0].neurons.per_layer().tolist() == own[lang].per_layer().tolist() and i.name.endswith("by 2")
    prints = {k: i.fingerprint for k, i in rows.items()}
    assert len(set(prints.values())) == 8 and prints == {k: i.fingerprint for k, i in task_rows(own, "x2", controls=3).items()}
    assert prints["random 0", "it"] != task_rows(own, "x2", seed=1)["random 0", "it"].fingerprint


def test_task_matrix_accepts_interventions_and_a_new_row_computes_itself_only(tmp_path):
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    some, tasks = NeuronSet([(0, i) for i in range(30)], view(model).shape), load_tasks(["xcopa_it", "xcopa_id"], DATA)
    one = evaluate_matrix(model, tasks, {("ablate", "it"): ablate(some)}, out=tmp_path, progress=False)
    before = len(list(tmp_path.iterdir()))
    two = evaluate_matrix(model, tasks, {("ablate", "it"): ablate(some), ("x2", "it"): amplify(some, by=2.)}, out=tmp_path, progress=False)
    assert (before, len(list(tmp_path.iterdir()))) == (2, 3)
    np.testing.assert_array_equal(one.scores["ablate", "it", "xcopa_id"], two.scores["ablate", "it", "xcopa_id"])
    assert two.kinds == ["ablate", "x2"] and two.provenance["edit"] == "ablate"


def test_task_matrix_metric_and_language_errors(tmp_path):
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    some = {"it": NeuronSet([(0, 1)], view(model).shape)}
    with pytest.raises(TaskError, match="no metric 'f1'.*acc"):
        evaluate_matrix(model, "xcopa_it", some, data_dir=DATA, metric="f1", progress=False)
    with pytest.raises(TaskError, match="nothing to intervene on"):
        evaluate_matrix(model, "xcopa_it", {"it": NeuronSet([], view(model).shape)}, data_dir=DATA, progress=False)
    task = load_tasks("xcopa_it", DATA)["xcopa_it"]
    task.set_config("dataset_name", None)
    with pytest.raises(TaskError, match="tells no language"): evaluate_matrix(model, {"riddles": task}, some, progress=False)


def test_task_matrix_survives_the_disk(tmp_path):
    m = toy()
    back = TaskMatrix.load(m.save(tmp_path/"m.safetensors"))
    pd.testing.assert_frame_equal(back.to_df(), m.to_df())
    pd.testing.assert_frame_equal(back.headline(), m.headline())
    assert "points" in m._repr_markdown_()


def test_task_matrix_figure_has_languages_values_and_intervals():
    fig = toy().plot()
    assert [a.text for a in fig.layout.annotations] == ["own", "random 0", "random 1"]
    assert fig.data[0].text[0][0].startswith("−") and " to " in fig.data[0].text[0][0]
    assert "Swahili" in fig.data[0].hovertext[2][2] and "of 60 items" in fig.data[0].hovertext[2][2]
    assert fig.layout.coloraxis.cmin == -fig.layout.coloraxis.cmax
    assert "Indonesian" in figure_html([fig])[0]
    twice = toy().to_df().query("kind == 'own'")
    with pytest.raises(ValueError, match="two values"): change_matrices(pd.concat([twice, twice]))


def test_task_matrix_two_tasks_of_one_language_have_columns_of_their_own():
    m = toy()
    scores = m.scores | {(k, of, "xquad_it"): x for (k, of, t), x in m.scores.items() if t == "xcopa_it"}
    fig = TaskMatrix(scores, m.langs | {"xquad_it": "it"}, "acc").plot()
    assert list(fig.layout.xaxis.ticktext) == ["xcopa_it", "xcopa_id", "xcopa_sw", "xquad_it"]


def test_task_matrix_from_the_command_line(tmp_path, capsys, caplog):
    planted = planted_model(("it", "id", "sw"))
    planted.hf.save_pretrained(tmp_path/"model")
    planted.tokenizer.save_pretrained(tmp_path/"model")
    v = view(load_model(str(tmp_path/"model")))
    LanguageNeurons({l: NeuronSet(n, v.shape) for l, n in planted.neurons.items()}, method="planted").save(tmp_path/"n.safetensors")
    common = ["eval", str(tmp_path/"model"), "xcopa_it,xcopa_id"]
    assert main([*common, str(tmp_path/"a"), "--data-dir", str(DATA), "--limit", "2"]) == 0
    out = capsys.readouterr().out
    assert "xcopa_it acc" in out and "2 items" in out and (tmp_path/"a/none.csv").exists()
    edited = ["--neurons", str(tmp_path/"n.safetensors"), "--lang", "it", "--edit", "x2"]
    assert main([*common, str(tmp_path/"a"), "--data-dir", str(DATA), *edited]) == 0
    assert len(pd.read_csv(tmp_path/"a/it-x2.csv")) == 2
    assert main([*common, str(tmp_path/"b"), "--data-dir", str(DATA), "--neurons", str(tmp_path/"n.safetensors"), "--controls", "1"]) == 0
    assert "on the neurons' own language" in capsys.readouterr().out
    files = {f.name for f in (tmp_path/"b").iterdir()}
    assert {"matrix.csv", "headline.csv", "matrix.safetensors"} <= files
    # pictures need a browser; without one it is said
    assert ("matrix.svg" in files) != ("figures are not written as pictures" in caplog.text)
    assert len(pd.read_csv(tmp_path/"b/matrix.csv")) == 12


@pytest.mark.parametrize("argv, words", [
    (["eval", "m", "xcopa_itt", "x"], "did you mean 'xcopa_it'"),
    (["eval", "m", "xcopa_it", "x", "--data-dir", "/no/such"], "is no folder"),
    (["eval", "m", "xcopa_it", "x", "--lang", "it"], "--lang needs --neurons"),
    (["eval", "/no/such/model", "xcopa_it", "x", "--data-dir", str(DATA)], "/no/such/model"),
])
def test_task_matrix_command_line_errors(argv, words, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err.strip()
    assert words in err and len(err.splitlines()) == 1
