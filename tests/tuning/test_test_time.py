"Test-time interventions: what is tried is one setting, and finished rows outlive a crash."
import numpy as np
import pytest
import torch

from adapters import loaded
from langneuron_mi.change.interventions import set_to
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.recording.record import record
from langneuron_mi.text.sources import load_corpus
from langneuron_mi.tuning.test_time import TestTime, TokenValues, Trial, test_time as run_test_time, token_values

TEXT = {"en": ["one two three four"]*12}
WORDS = dict(en="the cat sat on a red mat by old house near one lake".split(), vi="con mèo ngồi trên tấm thảm đỏ cạnh ngôi nhà cũ".split())


def texts(langs, n=60):
    rng = np.random.default_rng(0)
    return {l: [" ".join(rng.choice(WORDS[l], 6)) for _ in range(n)] for l in langs}


def test_trial_may_be_given_whole_or_by_name():
    assert Trial(values=("mean",)).controls == 1
    with pytest.raises(ValueError, match="no value 'median'"): Trial(values=("median",))
    with pytest.raises(TypeError, match="did you mean 'controls'"): run_test_time(None, {}, None, None, control=2)


def test_a_crash_keeps_the_rows_that_are_done(tmp_path):
    model, calls = loaded(), []
    neurons, ids = {"en": NeuronSet([(0, 3), (1, 5)], (2, 64))}, torch.tensor([[1, 7, 8]])
    def score(lang):
        calls.append(lang)
        if len(calls) == 3: raise RuntimeError("power cut")
        return {"logit": view(model).logits(ids)[0, -1, :4].detach().double().numpy()}
    trial = Trial(values=("zero", "mean"), tokens=60)
    with pytest.raises(RuntimeError, match="power cut"):
        run_test_time(model, neurons, score, load_corpus(TEXT), trial=trial, out=tmp_path, key=1, progress=False)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 and not view(model).active
    got = run_test_time(model, neurons, score, load_corpus(TEXT), trial=trial, out=tmp_path, key=1, progress=False)
    assert len(calls) == 3 + 7 - 2
    calm = run_test_time(model, neurons, score, load_corpus(TEXT), trial=trial, progress=False)
    assert got.scores.keys() == calm.scores.keys() and all(np.array_equal(x, calm.scores[k]) for k, x in got.scores.items())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_test_time_values_against_a_plain_hook(arch, tiny):
    hf, tok = tiny(arch)
    model = load_model(hf, tokenizer=tok)
    v, text = view(model), load_corpus(texts(("en", "vi")))
    s = NeuronSet([(0, 3), (1, 5), (1, 9)], v.shape)
    got = token_values(model, s, text, "vi", tokens=200, length=40)
    stats = record(model, text, tokens=200, langs=["vi"], length=40, progress=False)
    assert got.act.shape == (200, 3)
    assert torch.allclose(got.value("mean"), stats.value("vi", "mean").values[s.mask()].double(), atol=1e-5)
    assert torch.allclose(got.value("p100"), stats.value("vi", "max").values[s.mask()].double(), atol=1e-5)
    want = torch.stack([v.act_fn(l)(got.pre[:, i]) for i, (l, _) in enumerate(s)], 1)
    assert torch.allclose(got.act, want, atol=1e-5) and not torch.allclose(got.value("p10"), got.value("p10", "published"))
    assert np.allclose(got.value("p10").numpy(), np.quantile(got.act.double().numpy(), 0.1, axis=0)) and np.allclose(
        got.value("p10", "published").numpy(), np.quantile(got.pre.double().numpy(), 0.1, axis=0)
    )


def test_test_time_published_values_can_lie_where_no_activation_is():
    x = torch.linspace(-8, 8, 101)[:, None]
    values = TokenValues(x, torch.nn.functional.silu(x))
    assert values.value("p10") >= -.279 and values.value("p10", "published") == pytest.approx(-6.4, abs=1e-5)
    assert values.value("-10").item() == -10 and values.value("zero").item() == 0 and values.value("+1", "published").item() == 1
    with pytest.raises(ValueError, match="no statistics 'mine'"): values.value("mean", "mine")


def test_test_time_rows_are_the_interventions(tiny, tmp_path):
    hf, tok = tiny("llama")
    model = load_model(hf, tokenizer=tok)
    v, text, calls = view(model), load_corpus(texts(("en", "vi"))), []
    s = NeuronSet([(0, 3), (1, 5), (1, 9)], v.shape)
    ids = torch.tensor([tok("abc def").input_ids, tok("xyz uvw").input_ids])
    def score(lang):
        calls.append(lang)
        with torch.no_grad():
            return {"logit": v.logits(ids)[:, -1, 7].double().numpy()}

    result = run_test_time(
        model, {"vi": s}, score, text, values=("mean", "zero"), tokens=150, controls=2, out=tmp_path, key="logits", progress=False
    )
    assert len(calls) == 1 + 3 * 3 and not v.active
    values = token_values(model, s, text, "vi", tokens=150)
    for taken in ("consistent", "published"):
        with set_to(s, values.value("mean", taken)).on(model): want = score("vi")["logit"]
        assert np.allclose(result.scores["vi", "own", "mean", taken, "logit"], want)
    df = result.to_df()
    assert len(df) == 10 and df[df.neurons == "none"].change.item() == 0 and set(df[df.value == "zero"].statistics) == {"either"}
    n = len(calls)
    again = run_test_time(
        model, {"vi": s}, score, text, values=("mean", "zero"), tokens=150, controls=2, out=tmp_path, key="logits", progress=False
    )
    assert len(calls) == n and again.to_df().equals(df)
    assert TestTime.load(result.save(tmp_path / "t.safetensors")).to_df().equals(df)
    with pytest.raises(ValueError, match="pass key="):
        run_test_time(model, {"vi": s}, score, text, out=tmp_path)
    with pytest.raises(ValueError, match="owns no neurons"):
        run_test_time(model, {"vi": NeuronSet([], v.shape)}, score, text)
    with pytest.raises(ValueError, match="found at 'post'|of the site 'post'"):
        run_test_time(model, {"vi": NeuronSet([(0, 1)], v.shape, "post")}, score, text, tokens=100, progress=False)
