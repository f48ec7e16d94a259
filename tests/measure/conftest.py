"The planted model with toy facts: what comes after a word, asked in every language."
import pytest

from langneuron_mi.find.language_neurons import LanguageNeurons
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.measure.facts import Fact
from langneuron_mi.measure.probes import Probes
from langneuron_mi.models.loading import load_model
from langneuron_mi.recording.record import record
from langneuron_mi.testing.planted import planted_model
from langneuron_mi.text.sources import load_corpus


@pytest.fixture(scope="module")
def study():
    p = planted_model()
    model = load_model(p.hf, tokenizer=p.tokenizer)
    facts = [Fact(f"after {m}", "successor", {l: (f"{l}{m}", f"{l}{p.order[m]}") for l in p.langs}) for m in range(p.n_words)]
    probes = Probes(tuple(facts), {"successor": {l: "[X] [Y]" for l in p.langs}}, p.langs, "toy")
    train, held = load_corpus(p.texts(80, seed=0)).split(.3, seed=0)
    stats = record(model, train, groups="all", texts=40, progress=False)
    own = LanguageNeurons({l: NeuronSet(p.neurons[l], (2, stats.d_mlp)) for l in p.langs}, seen=stats.seen)
    return p, model, probes, stats, own, held
