"Generated texts: what is kept of them, and what is never mistaken for it."
import pytest

from langneuron_mi.change.generation import generate_texts
from langneuron_mi.change.interventions import ablate, set_to
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.models.hooked import ModelView
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.testing.planted import planted_model


@pytest.fixture
def planted():
    p = planted_model()
    model = load_model(p.hf, tokenizer=p.tokenizer)
    return p, model, NeuronSet(p.neurons["de"], view(model).shape)


@pytest.fixture
def written(monkeypatch):
    "The number of prompts of every call that reaches the model."
    calls, real = [], ModelView.generate
    def counted(self, texts, *args, **kwargs):
        calls.append(len(texts))
        return real(self, texts, *args, **kwargs)
    monkeypatch.setattr(ModelView, "generate", counted)
    return calls


def test_generation_keeps_each_intervention_by_what_decides_its_texts(planted, written, tmp_path):
    p, model, de = planted
    prompts, rows = {"en": p.texts(3, seed=3)["en"]}, {("set", "de"): set_to(de, 8.)}
    def run(prompts=prompts, rows=rows, **kwargs):
        before = sum(written)
        got = generate_texts(model, prompts, rows, max_new_tokens=kwargs.pop("max_new_tokens", 3), out=tmp_path, progress=False, **kwargs)
        return sum(written) - before, got.df
    first = run()
    assert first[0] == 6
    again = run()
    assert again[0] == 0 and again[1].equals(first[1])
    more = run(rows=rows | {("off", "de"): ablate(de)})
    assert more[0] == 3 and more[1].text.tolist()[:6] == first[1].text.tolist()  # one intervention more, one computed
    prompts_of_another_seed = {"en": p.texts(3, seed=4)["en"]}
    for other in (dict(max_new_tokens=4), dict(batch_size=2), dict(prompts=prompts_of_another_seed), dict(do_sample=True), dict(top_k=3)):
        assert run(**other)[0] == 6 and run(**other)[0] == 0, other
    assert run()[1].equals(first[1])


def test_generation_goes_on_where_it_was_stopped(planted, monkeypatch, tmp_path):
    p, model, de = planted
    prompts, rows = {"en": p.texts(3, seed=3)["en"]}, {("set", "de"): set_to(de, 8.), ("off", "de"): ablate(de)}
    whole, real, calls = generate_texts(model, prompts, rows, max_new_tokens=3, progress=False), ModelView.generate, []
    def dies(self, texts, *args, **kwargs):
        calls.append(len(texts))
        if len(calls) == 2: raise KeyboardInterrupt
        return real(self, texts, *args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(ModelView, "generate", dies)
        with pytest.raises(KeyboardInterrupt): generate_texts(model, prompts, rows, max_new_tokens=3, out=tmp_path, progress=False)
        assert not view(model).active and len(list(tmp_path.iterdir())) == 1
        again = generate_texts(model, prompts, rows, max_new_tokens=3, out=tmp_path, progress=False)
    assert len(calls) == 4 and again.df.equals(whole.df)


def test_generation_keeps_texts_in_a_folder_and_not_in_a_file(planted, tmp_path):
    p, model, de = planted
    (tmp_path/"texts.json").write_text("{}")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        generate_texts(model, {"en": ["a"]}, {}, out=tmp_path/"texts.json", progress=False)
