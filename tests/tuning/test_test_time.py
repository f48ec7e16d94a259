"Test-time interventions: what is tried is one setting, and finished rows outlive a crash."
import numpy as np
import pytest
import torch

from adapters import loaded
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.models.view import view
from langneuron_mi.text.sources import load_corpus
from langneuron_mi.tuning.test_time import Trial, test_time as run_test_time

TEXT = {"en": ["one two three four"]*12}


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
