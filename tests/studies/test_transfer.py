"The transfer study on tiny models: what is trained, what is kept, what is recomputed, what is refused; the paper's file."
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from langneuron_mi.cli import main
from langneuron_mi.text.sources import load_corpus
from langneuron_mi.text.languages import UnknownLanguage
from langneuron_mi.models.loading import load_model
from langneuron_mi.core.statistics import bootstrap_ratio
from langneuron_mi.testing.tiny import tiny_model
from langneuron_mi.studies.transfer_result import TransferResult, seed_interval
from langneuron_mi.studies.transfer_plan import CONDITIONS, Cell, condition_config
from langneuron_mi.studies.transfer_bench import Bench
from langneuron_mi.studies.transfer import TransferStudy, read_transfer

WORDS = dict(
    en="the cat sat on a red mat by old house near one lake".split(),
    vi="con mèo ngồi trên tấm thảm đỏ cạnh ngôi nhà cũ".split(),
    hi="बिल्ली लाल चटाई पर पुराने घर के पास बैठी".split(),
    ur="بلی سرخ چٹائی پر پرانے گھر کے پاس بیٹھی".split(),
    zh=list("猫坐在旧房子旁边的红垫子上看湖"),
)


def texts(langs, n=60):
    rng = np.random.default_rng(0)
    return {l: [" ".join(rng.choice(WORDS[l], 6)) for _ in range(n)] for l in langs}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Text, XNLI and XQuAD files, and two tiny models."
    at = tmp_path_factory.mktemp("transfer")
    for sub in ("text", "xnli", "xquad"): (at/sub).mkdir()
    for lang, lines in texts(WORDS).items(): (at/"text"/f"{lang}.txt").write_text("\n".join(lines), encoding="utf-8")
    for split, n in (("train", 24), ("test", 6)):
        for l in WORDS:
            (at / "xnli" / f"{split}.{l}.jsonl").write_text(
                "\n".join(json.dumps(dict(premise=f"{WORDS[l][i % 5]} {i}", hypothesis=WORDS[l][0], label=i % 3)) for i in range(n)),
                encoding="utf-8",
            )
    for l in ("en", "vi", "hi", "zh"):
        qas = [dict(id=f"q{i}", question=f"{WORDS[l][i % 5]}?", answers=[dict(text=WORDS[l][1], answer_start=0)]) for i in range(10)]
        (at / "xquad" / f"xquad.{l}.json").write_text(
            json.dumps(dict(data=[dict(paragraphs=[dict(context=" ".join(WORDS[l]), qas=qas)])])), encoding="utf-8"
        )
    for arch in ("llama", "mistral"):
        hf, tok = tiny_model(arch)
        hf.save_pretrained(at / arch), tok.save_pretrained(at / arch)
        config = json.loads((at / arch / "tokenizer_config.json").read_text())
        (at / arch / "tokenizer_config.json").write_text(
            json.dumps({k: x for k, x in config.items() if k != "pad_token"})
        )  # as the paper's models come
    return at


def small(out, **how):
    "A study that takes seconds."
    given = dict(
        model=load_model(*tiny_model("llama")[:1], tokenizer=tiny_model("llama")[1]),
        corpus=load_corpus(texts(("en", "vi", "hi")), aligned=True),
        langs=("en", "vi", "hi"),
        tune_langs=("vi",),
        tokens=800,
        method_options=dict(top=0.2, filter=0.5, bar=0.5),
        conditions=("none", "own", "random"),
        tuning=dict(lr=0.01, max_steps=3, batch_size=2),
        length=24,
        train_tokens=200,
        seeds=(0,),
        held_out=0.2,
        held_out_tokens=80,
        window=20,
        out=str(out),
    )
    return TransferStudy(**given | how)


@pytest.fixture
def trained(monkeypatch):
    "Which cells were trained or read (tune was called for them)."
    seen, real = [], Bench.tuned
    monkeypatch.setattr(Bench, "tuned", lambda self, cell: (seen.append(cell), real(self, cell))[1])
    return seen


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    study = small(tmp_path_factory.mktemp("base"))
    return study, study.run(progress=False, report=False)


def test_transfer_numbers_are_those_of_the_adapters(base):
    "Every cell again without the study: merge by hand, NLL by a plain loop."
    study, result = base
    bench = Bench(study, progress=False)
    cell = Cell("own", "vi", 0)
    tuned = bench.tuned(cell)
    assert set(tuned.neurons) == set(bench.neurons["vi"]) and not tuned.config.attention
    tuned.check()
    from langneuron_mi.text.windows import pack
    w, hf = pack(bench.held_out, bench.v.tokenizer, langs=["vi"], tokens=80, length=20, bos_token_id=bench.v.bos_token_id), tuned.merged()
    want = []
    for ids in w.batches("vi", 0, w.n_windows("vi")):
        for row in ids:
            with torch.no_grad(): logp = hf(row[None]).logits[0].double().log_softmax(-1)
            want.append(-float(sum(logp[i, row[i + 1]] for i in range(len(row) - 1))))
    assert np.allclose(result.units["own", "vi", 0, "perplexity", "vi"], want, rtol=1e-5)
    df = result.compare().set_index(["condition", "measure", "lang"])
    ratio = bootstrap_ratio(want, result.units["none", "", 0, "perplexity", "vi"], result.n_tokens["vi"])
    assert df.loc[("own", "perplexity", "vi")].effect == pytest.approx(ratio.value, rel=1e-5) and df.loc[
        ("own", "perplexity", "vi")
    ].low_items == pytest.approx(ratio.low, rel=1e-4)
    assert ratio.value != 1 and df.loc[("own", "perplexity", "vi")].trainable == tuned.count.trainable


def test_transfer_random_set_is_as_large_in_every_layer(base):
    bench = Bench(base[0], progress=False)
    own, a, b = (bench.chosen(c, "vi", s) for c, s in (("own", 0), ("random", 0), ("random", 1)))
    assert own.per_layer().tolist() == a.per_layer().tolist() and set(a) != set(b) and len(own) > 5
    assert set(bench.chosen("union", "vi", 0)) == set(own) | set(bench.neurons["en"]) and bench.chosen("full", "vi", 0) is None


def test_transfer_second_run_trains_nothing(base, trained):
    study, result = base
    again = study.run(progress=False, report=False)
    assert (
        not trained
        and all(np.array_equal(again.units[k], x) for k, x in result.units.items())
        and again.units.keys() == result.units.keys()
    )


@pytest.mark.parametrize("field,value,retrained,remeasured", [
    ("held_out_tokens", 60, {"own", "random"}, {"none", "own", "random"}), # the models are read back, nothing is trained
    ("sharing_items", 3, {"own", "random"}, {"none", "own", "random"}),
    ("seeds", (0, 1), {"own", "random"}, {"own", "random"}),
    ("tuning", dict(lr=.02, max_steps=3, batch_size=2), {"own", "random"}, {"own", "random"}),
    ("train_tokens", 180, {"own", "random"}, {"own", "random"}),
    ("conditions", ("none", "own", "random", "attention"), {"attention"}, {"attention"}),
    ("method_options", dict(top=.25, filter=.5, bar=.5), {"own", "random"}, {"own", "random"}),
    ("controls", 3, set(), set())])
def test_transfer_one_field_recomputes_its_dependents_only(base, trained, monkeypatch, tmp_path, field, value, retrained, remeasured):
    import shutil
    import langneuron_mi.tuning.training as tuning
    study = base[0]
    shutil.copytree(study.out, tmp_path/"out")
    opened, steps, real, run = [], [], Bench.opened, tuning._run
    monkeypatch.setattr(Bench, "opened", lambda self, cell: (opened.append(cell.condition), real(self, cell))[1])
    monkeypatch.setattr(tuning, "_run", lambda *a: (steps.append(1), run(*a))[1])
    got = replace(study, out=str(tmp_path/"out"), **{field: value}).run(progress=False, report=False)
    assert {c.condition for c in trained} == retrained and set(opened) == remeasured
    assert bool(steps) == (field not in ("held_out_tokens", "sharing_items", "controls"))
    if field == "seeds": assert {c.seed for c in trained} == {1} and got.seeds == [0, 1]


def test_transfer_killed_study_goes_on(base, trained, tmp_path, monkeypatch):
    study = replace(base[0], out=str(tmp_path/"killed"))
    real = Bench.tuned
    def stops(self, cell):
        if cell.condition == "random": raise KeyboardInterrupt
        return real(self, cell)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Bench, "tuned", stops)
        study.run(progress=False, report=False)
    trained.clear()
    got = study.run(progress=False, report=False)
    assert {c.condition for c in trained} == {"random"}
    assert all(np.array_equal(got.units[k], x) for k, x in base[1].units.items())


def test_transfer_held_out_text_is_not_trained_on(base):
    bench = Bench(base[0], progress=False)
    for lang in ("en", "vi", "hi"): assert not set(bench.train.texts(lang)) & set(bench.held_out.texts(lang))
    rows = bench.rows("vi")
    seen = bench.v.tokenizer.decode([t for i in range(len(rows)) for t in rows[i]["input_ids"]], skip_special_tokens=True)
    assert not any(t in seen for t in bench.held_out.texts("vi")) and any(t in seen for t in bench.train.texts("vi"))


def test_transfer_alignment_moves_the_shares(tmp_path):
    study = small(
        tmp_path,
        task="align",
        conditions=("none", "full", "shared"),
        sharing_items=6,
        seeds=(0, 1),
        tuning=dict(lr=0.02, max_steps=6, batch_size=4),
        length=160,
        held_out_tokens=0,
    )
    result = study.run(progress=False)
    df = result.compare()
    assert (
        set(df.measure) == {"all-shared", "partial-shared", "specific", "non-activated"}
        and (df.n_seeds == 2).all()
        and (df.n_items == 6).all()
    )
    assert df.groupby("condition").effect.sum().abs().max() < 1e-9  # the four shares sum to one before and after
    assert (df[df.condition == "full"].effect.abs() > 0).any() and (df.low <= df.effect).all() and (df.effect <= df.high).all()
    bench = Bench(study, progress=False)
    from langneuron_mi.share.sharing import sharing

    want = (
        sharing(bench.opened(Cell("full", "vi", 1))[0], bench.prompts(bench.held_out, 6, study.langs), progress=False)
        .shares[0, :, :, 0]
        .mean(1)
    )
    assert np.allclose(result.units["full", "vi", 1, "all-shared", "all"], want)
    assert any("share of all-shared neurons" in s for s in result.sentences()) and (tmp_path / "figures").is_dir()
    with pytest.raises(ValueError, match="need aligned texts"):
        small(tmp_path / "b", corpus=load_corpus(texts(("en", "vi", "hi"))), sharing_items=3).run(progress=False)


def test_transfer_seed_interval_is_students():
    from scipy import stats
    x = [.9, .94, .97]
    low, high = stats.t.interval(.95, 2, np.mean(x), stats.sem(x))
    got = seed_interval(x)
    assert (got.low, got.high) == pytest.approx((low, high)) and got.n == 3
    assert np.isnan(seed_interval([.5]).low) and seed_interval([.5]).value == .5


def test_transfer_compare_pairs_by_seed(base):
    "By hand: two seeds, ratio of perplexities and difference of accuracies."
    a, b, n = np.array([[20., 30.], [22., 30.]]), np.array([[21., 33.], [25., 33.]]), np.array([10., 10.])
    units = {("own", "vi", s, "perplexity", "vi"): a[s] for s in (0, 1)} | {("random", "vi", s, "perplexity", "vi"): b[s] for s in (0, 1)}
    units |= {("own", "vi", s, "accuracy", "vi"): np.array([1.0, 1.0, 0.0, float(s)]) for s in (0, 1)} | {
        ("random", "vi", s, "accuracy", "vi"): np.array([1.0, 0.0, 0.0, 0.0]) for s in (0, 1)
    }
    r = TransferResult(units, {"vi": n}, {("own", "vi"): 5, ("random", "vi"): 5}, base[1].neurons, None, {})
    df = r.compare("random").set_index("measure")
    logs = (a - b).sum(1) / 20
    assert df.effect["perplexity"] == pytest.approx(np.exp(logs.mean())) and np.log(df.low["perplexity"]) == pytest.approx(
        seed_interval(logs).low
    )
    assert df.effect["accuracy"] == pytest.approx(np.mean([0.25, 0.5])) and df.value["accuracy"] == pytest.approx(0.625)
    assert r.compare("none").empty


def test_transfer_result_survives_the_disk(base, tmp_path):
    result = base[1]
    again = TransferResult.load(result.save(tmp_path / "r.safetensors"))
    assert (
        again.compare().equals(result.compare())
        and again.trainable == result.trainable
        and again.test_time is None
        and set(again.neurons["vi"]) == set(result.neurons["vi"])
    )


@pytest.mark.parametrize(
    "bad,why",
    [
        (dict(conditions=("mine",)), "no condition 'mine'"),
        (dict(task="qa"), "no task 'qa'"),
        (dict(tune_langs=()), "names no language"),
        (dict(tune_langs=("zh",)), "tune_langs names zh, which is not among langs"),
        (dict(pivot="zh", conditions=("union",)), "pivot names zh"),
        (dict(task="xnli"), "xnli needs its data"),
        (dict(test_on="full", conditions=("own",)), "not among the conditions"),
        (dict(task="xnli", task_data="x", test_values=("zero",)), "has no head for xnli"),
        (dict(test_values=("median",)), "no value 'median'"),
        (dict(method="magic"), "no method"),
        (dict(method_options={"topp": 1}), "no option topp"),
        (dict(window=1), "window must be 2"),
        (dict(held_out=1.0), "held_out is a share"),
        (dict(tuning={"mlp": "all"}), "conditions and seeds do"),
        (dict(tuning={"rnk": 1}), "tuning has no 'rnk'; did you mean 'rank'"),
        (dict(tuning={"rank": 0}), "rank=0"),
        (dict(preset="nli"), "no preset"),
        (dict(langs=("vi", "vi")), "at least two languages"),
    ],
)
def test_transfer_bad_studies_fail_at_once(tmp_path, bad, why):
    with pytest.raises(ValueError, match=why): TransferStudy(**dict(langs=("en", "vi"), tune_langs=("vi",)) | bad)


def test_transfer_errors_of_data_come_before_training(tmp_path, place, trained):
    with pytest.raises(UnknownLanguage, match="no language 'xxq'"): TransferStudy(langs=("en", "xxq"))
    how = dict(task="xnli", conditions=("attention",), held_out_tokens=0)
    with pytest.raises(ValueError, match="no file .*train.vi.jsonl"):
        small(tmp_path / "a", task_data=str(tmp_path), **how).run(progress=False)
    (tmp_path / "train.vi.jsonl").write_text(json.dumps(dict(premise="a", hypothesis="b", label=7)), encoding="utf-8")
    with pytest.raises(ValueError, match="item 0: the label 7 is none of 0 to 2"):
        small(tmp_path / "a", task_data=str(tmp_path), **how).run(progress=False)
    with pytest.raises(ValueError, match=r"no \*.ur.json"):
        small(tmp_path / "c", task="xquad", task_data=str(place / "xquad"), task_lang="ur", conditions=("full",)).run(progress=False)
    with pytest.raises(ValueError, match="gives vi no neurons here"):
        small(tmp_path / "d", method_options=dict(top=0.0005, filter=0.99, bar=0.999)).run(progress=False)
    study = small(tmp_path / "f")
    study.model.tokenizer.pad_token = None  # TransformerLens sets one when it wraps a model
    with pytest.raises(ValueError, match='has no pad token; give pad_token = "eos"'): study.run(progress=False)
    with pytest.raises(ValueError, match="knows no token '<filler>'"): replace(study, pad_token="<filler>").run(progress=False)
    assert Bench(replace(study, pad_token="eos"), progress=False).v.tokenizer.pad_token_id == study.model.tokenizer.eos_token_id
    (tmp_path / "test.vi.jsonl").write_text(json.dumps(dict(premise="a", hypothesis="b", label=-1)), encoding="utf-8")
    (tmp_path / "train.vi.jsonl").write_text(json.dumps(dict(premise="a", hypothesis="b", label=2)), encoding="utf-8")
    with pytest.raises(ValueError, match="test, vi, item 0: the label -1"):
        small(tmp_path / "e", task_data=str(tmp_path), **how).run(progress=False)
    assert not trained


def test_transfer_conditions_train_what_they_say():
    assert {c: (condition_config(c).mlp, condition_config(c).attention) for c in ("own", "own+attention", "attention", "full")} == {
        "own": ("neurons", False), "own+attention": ("neurons", True), "attention": ("none", True), "full": ("all", True)}
    for c in CONDITIONS[1:]: assert condition_config(c, rank=3, seed=4).rank == 3


def test_transfer_preset_is_the_papers():
    studies = read_transfer("experiments/no_transfer.toml")
    assert [(s.model.split("/")[-1], s.task) for s in studies] == [
        (m, t) for m in ("Llama-3.1-8B", "Mistral-Nemo-Base-2407") for t in ("xnli", "xquad")
    ]
    xnli, xquad = studies[:2]
    assert (
        xnli.tune_langs == ("vi", "hi", "ur")
        and xquad.tune_langs == ("vi", "hi", "zh")
        and set(xnli.tune_langs + xquad.tune_langs) < set(xnli.langs)
        and len({s.out for s in studies}) == 4
    )
    config, length, share = xnli._tuning()
    assert (
        config["rank"],
        config["alpha"],
        config["lr"],
        config["weight_decay"],
        config["clip"],
        config["warmup"],
        config["epochs"],
        length,
        share,
    ) == (8, 16, 1e-5, 0.1, 10.0, 0.01, 1, 256, 0.25)
    config, length, share = xquad._tuning()
    assert (config["rank"], config["alpha"], config["lr"], config["epochs"], length, share) == (64, 128, 5e-5, 10, 512, .8)
    assert len(xnli.test_values) == 13 and xnli.test_items is None


def test_transfer_preset_plumbing_on_tiny_llama_and_mistral(place, capsys):
    "The paper's own file, with models, text, task data and sizes replaced by tiny ones, from the command line to the reports."
    lines = open("experiments/no_transfer.toml", encoding="utf-8").read().splitlines()
    new = dict(
        models=[str(place / "llama"), str(place / "mistral")],
        langs=["en", "vi", "hi", "ur", "zh"],
        corpus=str(place / "text"),
        tokens=500,
        held_out=0.2,
        held_out_tokens=60,
        window=20,
        conditions=["none", "attention", "own+attention", "union+attention", "random+attention", "full"],
        seeds=[0],
        test_items=4,
        test_values=["zero", "mean", "p10", "-10"],
        out=str(place / "out"),
        new_tokens=3,
    )
    small_tuning = 'tuning = { max_steps = 2, batch_size = 2, lr = 0.01, dtype = "bfloat16", gradient_checkpointing = true }'
    out = []
    for line in lines:
        key = line.split(" =")[0]
        if key in new: line = f"{key} = {json.dumps(new[key])}"
        if key == "task_data": line = f"task_data = {json.dumps(str(place/('xquad' if 'xquad' in line else 'xnli')))}"
        if key == "tune_langs": line = 'tune_langs = ["vi", "ur"]' if "ur" in line else 'tune_langs = ["vi", "zh"]'
        out.append(small_tuning if key == "tuning" else line + "\nmethod_options = { top = 0.1 }" if key == "method" else line)
    (place / "study.toml").write_text("\n".join(out), encoding="utf-8")
    assert main(["tune", str(place / "study.toml"), "--model", str(place / "llama"), "--task", "xnli"]) == 0
    assert (
        main(
            [
                "tune",
                str(place / "study.toml"),
                "--model",
                str(place / "mistral"),
                "--task",
                "xquad",
                "--conditions",
                "none,attention,own+attention",
                "--seeds",
                "0,1",
                "--out",
                str(place / "other"),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert said.count("report: ") == 2 and "Own neurons and attention against attention only" in said
    for folder, langs, metrics, conditions in (
        (place / "out" / "xnli", {"vi", "ur"}, {"accuracy"}, {"own+attention", "union+attention", "random+attention", "full"}),
        (place / "other" / "xquad", {"vi", "zh"}, {"em", "f1"}, {"own+attention"}),
    ):
        assert (folder / "report.html").stat().st_size > 50_000
        effects, against = (pd.read_csv(folder / "tables" / f"{t}.csv") for t in ("effects", "against_attention"))
        assert metrics <= set(against.measure) and set(against.condition) == conditions and set(against.tuned_on) == langs
        assert set(effects.measure) == {"perplexity"} | (metrics if "em" in metrics else set())  # an untouched model has no head
        times = pd.read_csv(folder/"tables"/"test_time.csv", keep_default_na=False)
        assert set(times.value) == {"zero", "mean", "p10", "-10", "none"} and set(times.metric) == metrics and set(times.lang) == langs
        assert set(times[times.value.isin(["mean", "p10"])].statistics) == {"consistent", "published"}
    assert set(pd.read_csv(place/"other"/"xquad"/"tables"/"models.csv").seed) == {0, 1}
    # English items train the same attention, and the same full LoRA, whatever language they are to help
    assert {c: len(list((place / "out" / "xnli" / "tuned").glob(f"{c}-*"))) for c in ("attention", "full", "own+attention")} == {
        "attention": 1,
        "full": 1,
        "own+attention": 2,
    }


def test_transfer_command_errors(tmp_path, capsys):
    assert main(["tune", str(tmp_path/"none.toml")]) == 2
    (tmp_path/"a.toml").write_text('tune_lang = "vi"', encoding="utf-8")
    assert main(["tune", str(tmp_path/"a.toml")]) == 2
    with pytest.raises(SystemExit): main(["tune", "experiments/no_transfer.toml", "--seeds", "one"])
    assert main(["tune", "experiments/no_transfer.toml", "--tune_langs", "xxq"]) == 2
    err = capsys.readouterr().err
    assert (
        "no study file" in err
        and "has no 'tune_lang'; did you mean 'tune_langs'" in err
        and "--seeds: got 'one'; give a whole number or several, with commas" in err
        and "no language 'xxq'" in err
        and err.count("\n") == 4
    )


def test_transfer_classifier_of_the_study_is_the_trained_one(tmp_path, place):
    "Accuracy through the hooked body and the head equals the merged Hugging Face classifier, item by item."
    study = small(
        tmp_path,
        task="xnli",
        task_data=str(place / "xnli"),
        task_lang="en",
        conditions=("full",),
        tuning=dict(lr=0.05, max_steps=6, batch_size=4),
        length=64,
        held_out_tokens=0,
    )
    result, bench = study.run(progress=False, report=False), Bench(study, progress=False)
    from langneuron_mi.tuning.data import nli_rows
    merged = bench.tuned(Cell("full", "vi", 0)).merged()
    rows = nli_rows(bench._items("vi", "test"), bench.v.tokenizer, 64)
    with torch.no_grad():
        want = [
            float(
                merged(input_ids=torch.tensor([r["input_ids"]]), attention_mask=torch.ones(1, len(r["input_ids"]), dtype=torch.long))
                .logits[0]
                .argmax()
                == r["labels"]
            )
            for r in rows
        ]
    assert result.units["full", "vi", 0, "accuracy", "vi"].tolist() == want
