"Ray: a real cluster of two nodes on this machine, workers and drivers killed; the bits of one process every time."
import http.server
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lens import lens_models

import langneuron_mi.scale.ray as scaling
from langneuron_mi.recording.stats import ActivationStats
from langneuron_mi.core.atomic import ArtifactError
from langneuron_mi.core.engine import Session
from langneuron_mi.core.storage import mirrored
from langneuron_mi.cli import main
from langneuron_mi.scale.workers import Pool, _facts_of, _reachable
from langneuron_mi.scale.recipes import Recipe, ScalingError, recipe_of
from langneuron_mi.scale.ray import RayEngine
from langneuron_mi.text.sources import load_corpus
from langneuron_mi.change.interventions import ablate
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.find.language_neurons import LanguageNeurons
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.measure.perplexity import perplexity_matrix
from langneuron_mi.measure.facts import Fact
from langneuron_mi.measure.probes import Probes
from langneuron_mi.recording.passes import RecordingError
from langneuron_mi.recording.recorder import Recorder
from langneuron_mi.recording.record import record
from langneuron_mi.share.sharing import sharing
from langneuron_mi.models.attention import attend
from langneuron_mi.measure.steering import lss
from langneuron_mi.testing.planted import planted_model
from langneuron_mi.text.windows import pack

pytestmark = pytest.mark.xdist_group("ray")  # one cluster, whatever the number of pytest's own workers
ROOT = Path(__file__).resolve().parents[2]
ARGS = dict(
    length=24, shard_size=2, batch_size=2, groups="all", texts=20, progress=False
)  # all groups: float sums, maxima, histograms, texts


@pytest.fixture(scope="module")
def cluster():
    "Two nodes with two CPUs each, in name; nothing is started before it is needed."
    import ray
    from ray.cluster_utils import Cluster
    quick = dict(object_store_memory=80_000_000, include_dashboard=False)
    c = Cluster(
        initialize_head=True,
        head_node_args=quick | dict(num_cpus=2, _system_config=dict(prestart_worker_first_driver=False, enable_worker_prestart=False)),
    )
    c.add_node(num_cpus=2, **quick)
    ray.init(address=c.address, log_to_driver=False, logging_level=logging.ERROR)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
    yield c
    ray.shutdown()
    c.shutdown()


@pytest.fixture(scope="module")
def engine(cluster):
    "Three workers; their model is loaded once for the whole module."
    with RayEngine(workers=3) as e: yield e


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "The planted model as a folder, its texts as files, and what one process records of them."
    p, folder = planted_model(), tmp_path_factory.mktemp("planted")
    p.hf.save_pretrained(folder / "model")
    p.tokenizer.save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    for lang, lines in p.texts(80, seed=0).items(): (folder / "texts" / f"{lang}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(saved): return load_model(saved / "model")


TEXTS = planted_model().texts(80, seed=0)


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    "One process, no Ray: the bytes that must come out."
    folder = tmp_path_factory.mktemp("alone")
    record(model, TEXTS, out=folder, **ARGS)
    return files(folder)


def files(folder) -> dict[str, bytes]: return {f.name: f.read_bytes() for f in Path(folder).iterdir() if f.suffix == ".safetensors"}


def test_ray_same_bits_with_1_2_and_3_workers_on_two_nodes(cluster, engine, model, alone, tmp_path, monkeypatch):
    import ray
    assert sum(n["Alive"] for n in ray.nodes()) == 2
    pool = engine.pool(recipe_of(model), _facts_of(view(model)))
    while pool.starting: pool._welcome(ray.wait(list(pool.starting))[0][0])  # all three are there
    for n in (3, 2, 1):
        monkeypatch.setattr(pool, "size", n)  # so many of its workers
        record(model, TEXTS, engine=engine, out=tmp_path / str(n), **ARGS)
        assert files(tmp_path / str(n)) == alone
    assert engine._pool is pool and len(set(ray.get([a.do.remote(pid_of, None, None) for a in pool.ready]))) == 3


def test_ray_worker_killed_in_the_middle(engine, model, alone, tmp_path, monkeypatch, caplog):
    "SIGKILL to a worker that has shards in hand: the run finishes, same bits, and says what happened."
    import ray
    real, killed = scaling.RaySession.results, []
    def results(self, *args):
        for k, part in enumerate(real(self, *args)):
            if k == 2:
                pool = self.pool()
                pid = ray.get(pool.ready[0].do.remote(pid_of, None, None))
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            yield part
    monkeypatch.setattr(scaling.RaySession, "results", results)
    with caplog.at_level(logging.WARNING, "langneuron_mi.scale.workers"): record(model, TEXTS, engine=engine, out=tmp_path, **ARGS)
    assert killed and files(tmp_path) == alone
    assert "a worker died" in caplog.text


def pid_of(v, common, unit): return os.getpid()


def test_ray_results_in_order_errors_and_lost_units(engine, model, monkeypatch):
    "Slow first units do not change the order; a task's own error arrives as it was; a unit that kills every worker is named."
    pool = engine.pool(recipe_of(model), _facts_of(view(model)))
    assert list(pool.map(slow_first, range(12))) == list(range(12))
    assert pool.first["model"]["model"] == view(model).fingerprint
    with pytest.raises(RecordingError, match="unit 3 is bad"): list(pool.map(fails_at_3, range(6)))
    with pytest.raises(RecordingError, match="hook .* tokens"): list(pool.map(wrong_shard, [0]))
    monkeypatch.setattr(engine, "retries", 0)
    with pytest.raises(ScalingError, match="unit 0 of 1 has ended 1 workers"): list(pool.map(dies, [0]))
    monkeypatch.undo()
    assert list(pool.map(slow_first, range(3))) == [0, 1, 2], "the dead worker is found out, and replaced"


def slow_first(v, common, unit):
    time.sleep(.2 if unit in (0, 3) else 0)
    return unit


def fails_at_3(v, common, unit):
    if unit == 3: raise RecordingError("unit 3 is bad")
    return unit


def wrong_shard(v, common, unit): raise RecordingError("hook x saw 1 of 2 tokens")


def dies(v, common, unit): os.kill(os.getpid(), signal.SIGKILL)


DRIVER = """
import sys, time, warnings; warnings.filterwarnings("ignore")
import torch; torch.set_num_threads(1)
import langneuron_mi.scale.ray as scaling
from langneuron_mi.recording.record import record
from langneuron_mi.testing.planted import planted_model
real = scaling.RaySession.results
def results(self, *args):
    for k, part in enumerate(real(self, *args)):
        if k == 5: time.sleep(600)  # killed here, with checkpoints written and shards in hand
        yield part
scaling.RaySession.results = results
record(sys.argv[1], planted_model().texts(80, seed=0), length=24, shard_size=2, batch_size=2, groups="all", texts=20, progress=False,
       out=sys.argv[2], checkpoint_every=0., engine=scaling.RayEngine(workers=1, address=sys.argv[3]))
"""


def test_ray_driver_killed_and_resumed(cluster, engine, saved, model, alone, tmp_path, monkeypatch):
    "SIGKILL to the process that merges; another one goes on from its checkpoint. The first one never loaded the model: it gave a name."
    p = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(saved / "model"), str(tmp_path), cluster.address],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))),
    )
    while not list(tmp_path.glob("part-*")):
        assert p.poll() is None, p.stderr.read()[-2000:]
        time.sleep(.1)
    p.send_signal(signal.SIGKILL)
    p.communicate()
    asked, real = [], Pool.map
    def units(self, task, units, *args):
        asked.extend(s.number for _, s in units)
        return real(self, task, units, *args)
    monkeypatch.setattr(Pool, "map", units)
    record(model, TEXTS, engine=engine, out=tmp_path, **ARGS)
    assert 0 not in asked and len(asked) > 10, "the first shards were kept, the others were not there"
    assert files(tmp_path) == alone


def test_ray_interrupted_keeps_what_is_merged(engine, model, alone, tmp_path, monkeypatch):
    real = scaling.RaySession.results
    def stop(self, *args):
        for k, part in enumerate(real(self, *args)):
            if k == 3: raise KeyboardInterrupt
            yield part
    with monkeypatch.context() as m:
        m.setattr(scaling.RaySession, "results", stop)
        with pytest.raises(KeyboardInterrupt, match="same call again"): record(model, TEXTS, engine=engine, out=tmp_path, **ARGS)
    assert list(tmp_path.glob("part-*"))
    record(model, TEXTS, out=tmp_path, **ARGS)  # goes on without a cluster
    assert files(tmp_path) == alone


def test_ray_perplexity_matrix_same_bits(engine, model, tmp_path):
    p = planted_model()
    sets = {("planted", lang): ablate(NeuronSet(pairs, shape=view(model).shape)) for lang, pairs in p.neurons.items()}
    args = dict(tokens=100, length=16, batch_size=2, seen={}, progress=False)
    there = perplexity_matrix(model, p.texts(30, seed=5), sets, engine=engine, out=tmp_path, **args)
    here = perplexity_matrix(model, p.texts(30, seed=5), sets, **args)
    assert there.nll.keys() == here.nll.keys() and all(np.array_equal(there.nll[k], x) for k, x in here.nll.items())
    assert len(list(tmp_path.glob("perplexity_cell-*"))) == 12
    again = perplexity_matrix(model, p.texts(30, seed=5), sets, out=tmp_path, **args)  # rows measured there are found here
    assert all(np.array_equal(again.nll[k], x) for k, x in here.nll.items())


def test_ray_sharing_same_counts(engine, model):
    p = planted_model()
    prompts = {lang: lines[:7] for lang, lines in p.texts(10, seed=4).items()}
    args = dict(batch_size=2, theta=[0., .1], progress=False)
    there, here = sharing(model, prompts, engine=engine, **args), sharing(model, prompts, **args)
    assert all(torch.equal(getattr(there, k), getattr(here, k)) for k in ("category_counts", "specific_counts", "per_input"))
    assert there.provenance["model"] == here.provenance["model"]


def test_ray_lss_same_numbers(engine, model, saved, tmp_path, monkeypatch):
    "Scores, cost and folder as without a cluster, also with a model that this process never loads."
    p = planted_model()
    shape, held = view(model).shape, load_corpus(p.texts(30, seed=5))
    neurons = LanguageNeurons({lang: NeuronSet(pairs, shape=shape) for lang, pairs in p.neurons.items()}, seen={})
    facts = [Fact(f"after {m}", "successor", {l: (f"{l}{m}", f"{l}{p.order[m]}") for l in p.langs}) for m in range(6)]
    probes = Probes(tuple(facts), {"successor": {l: "[X] [Y]" for l in p.langs}}, p.langs, "toy")
    stats = record(model, TEXTS, **(ARGS | dict(groups=("counts", "moments"))))
    args = dict(interventions=["x3", "mean"], stats=stats, text=held, text_tokens=60, progress=False)
    here, there = lss(model, neurons, probes, **args), lss(model, neurons, probes, engine=engine, out=tmp_path, **args)
    pd.testing.assert_frame_equal(there.items, here.items, check_exact=True)
    pd.testing.assert_frame_equal(there.cost, here.cost, check_exact=True)
    assert {k: x for k, x in there.work.items() if k != "seconds"} == {k: x for k, x in here.work.items() if k != "seconds"}
    by_name = lss(saved / "model", neurons, probes, engine=engine, **args)
    pd.testing.assert_frame_equal(by_name.items, here.items, check_exact=True)
    monkeypatch.setattr("langneuron_mi.measure.steering.log_probs", lambda *a, **k: pytest.fail("everything is kept"))
    again = lss(model, neurons, probes, out=tmp_path, **args)
    pd.testing.assert_frame_equal(again.items, here.items, check_exact=True)
    assert again.work["from_cache"] == len(here.items) + len(here.items.drop_duplicates(["base", "target", "fact"]))


def test_ray_folders_of_a_url(tmp_path):
    "What lies in a folder of the folder travels too."
    import fsspec
    with mirrored("memory://runs/deep") as (folder, saved):
        (folder / "perplexity").mkdir()
        (folder / "perplexity/row").write_text("1")
        (folder / "scores").write_text("2")
        saved()
        (folder / "scores").unlink()
    fs = fsspec.filesystem("memory")
    assert [n for n in fs.find("/runs/deep")] == ["/runs/deep/perplexity/row"]
    with mirrored("memory://runs/deep") as (folder, saved):
        assert (folder / "perplexity/row").read_text() == "1" and not (folder / "scores").exists()


def test_ray_command_line_and_url(cluster, saved, tmp_path, capsys, monkeypatch):
    "The command on the cluster; its model is loaded by the worker alone, its folder is a URL."
    import fsspec
    monkeypatch.setattr("langneuron_mi.models.loading.load_model", lambda *a, **k: pytest.fail("this process need not load the model"))
    line = ["record", str(saved / "model"), str(saved / "texts"), "en,de,fr", "--tokens", "400", "--length", "24"]
    assert main([*line[:4], "memory://runs/cli", *line[4:], "--engine", "ray", "--workers", "1"]) == 0, capsys.readouterr().err
    monkeypatch.undo()
    assert main([*line[:4], str(tmp_path / "here"), *line[4:]]) == 0
    fs = fsspec.filesystem("memory")
    assert {n.rsplit("/", 1)[-1] for n in fs.ls("/runs/cli", detail=False)} == {p.name for p in (tmp_path / "here").iterdir()}
    assert fs.cat("/runs/cli/stats.safetensors") == (tmp_path / "here/stats.safetensors").read_bytes()
    assert "1,200 tokens" in capsys.readouterr().out


def test_ray_checkpoints_at_a_url(model, alone, tmp_path):
    "Every checkpoint is stored; what is gone here goes there; a second machine goes on from it."
    import fsspec
    fs = fsspec.filesystem("memory")
    names = lambda: {n.rsplit("/", 1)[-1] for n in fs.ls("/runs/url", detail=False)}
    seen = []
    class Stops:
        @contextmanager
        def session(self, model, look, run):
            with mirrored(run.out) as (folder, saved):
                yield Stopping(look(model), folder, False, lambda: (saved(), seen.append(names())))

    with pytest.raises(RecordingError, match="stop"):
        record(model, TEXTS, out="memory://runs/url", engine=Stops(), checkpoint_every=0.0, **ARGS)
    assert any(f"part-{l}.safetensors" in seen[-1] for l in ("en", "de", "fr")) and not any(n.endswith(".tmp") for s in seen for n in s)
    record(model, TEXTS, out="memory://runs/url", **ARGS)
    with mirrored("memory://runs/url") as (folder, _): assert files(folder) == alone
    assert not any(n.startswith("part-") for n in names()) and "stats.safetensors" in names()
    with pytest.raises(ArtifactError, match="fsspec"):
        with mirrored("nosuch://a/b"): pass
    with mirrored(tmp_path) as (folder, _): assert folder == tmp_path


class Stopping(Session):
    "This process, which fails at the fifth part."
    def results(self, work, parts, tick):
        for k, part in enumerate(super().results(work, parts, tick)):
            if k == 4: raise RecordingError("stop")
            yield part


def test_ray_bad_requests_are_one_clear_error(cluster, model, monkeypatch):
    for bad, words in ((dict(workers=0), "give 1 or more"), (dict(cpus=0), "needs a CPU")):
        with pytest.raises(ScalingError, match=words): RayEngine(**bad)
    with pytest.raises(ScalingError, match="9 workers of 1 CPUs each do not fit: the cluster has 4 CPUs .*on 2 machines, room for 4"):
        record(model, TEXTS, engine=RayEngine(workers=9), **ARGS)
    with pytest.raises(ScalingError, match="GPUs each do not fit"):
        record(model, TEXTS, engine=RayEngine(gpus=1), **ARGS)
    with pytest.raises(ScalingError, match="connected to the Ray cluster"):
        record(model, TEXTS, engine=RayEngine(address="127.0.0.1:1"), **ARGS)
    with pytest.raises(ValueError, match="no engine 'spark'"):
        record(model, TEXTS, engine="spark", **ARGS)
    remote = scaling.RemoteView(dict(model=view(model).describe(), n_ctx=64, d_model=view(model).d_model), view(model).tokenizer)
    with pytest.raises(ScalingError, match='batch_size="auto"'):
        Recorder(remote, ("counts",)).measured_batch_size(
            pack(load_corpus(TEXTS), remote.tokenizer, length=24, bos_token_id=remote.bos_token_id), 2
        )


def test_ray_address_without_a_cluster(cluster, monkeypatch):
    import ray
    _reachable(cluster.address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        for address, words in (
            ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"),
            ("ray://127.0.0.1:1", "answers at ray://"),
            ("my cluster", "is no address of a Ray cluster"),
            (f"127.0.0.1:{web.server_port}", "something else listens there.*ray start"),
        ):
            with pytest.raises(ScalingError, match=words):
                RayEngine(address=address).__enter__()
        web.shutdown()


def test_ray_not_installed(model, monkeypatch, capsys, saved, tmp_path):
    import importlib.util
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ray" else real(name, *a))
    with pytest.raises(ScalingError, match=r'pip install "langneuron_mi\[scale\]"'): record(model, TEXTS, engine="ray", **ARGS)
    assert main(["record", str(saved / "model"), str(saved / "texts"), "en,de", str(tmp_path), "--engine", "ray"]) == 2
    assert "langneuron_mi[scale]" in capsys.readouterr().err


def test_ray_worker_refuses_another_model(engine, model):
    "Weights edited in memory after loading are not those of the folder; sent along, they are."
    edited = load_model(recipe_of(model).source)
    with torch.no_grad(): view(edited).hf.model.layers[0].mlp.gate_proj.weight.mul_(1.5)
    recipe, same = recipe_of(edited), _facts_of(view(edited))
    assert recipe.data is None
    assert view(recipe_of(edited, send=True).load("cpu")).fingerprint == view(edited).fingerprint
    few = RayEngine(workers=1)
    few._stack, few._size = engine._stack, (1, 0)
    with pytest.raises(ScalingError, match=r"does not hold the same model: model is .*RayEngine\(send=True\)"):
        few.pool(recipe, same).wait_for_one()
    few._pool.close()


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "bloom"])
def test_ray_recipe_of_a_model_in_memory(arch):
    "What is sent gives the same model, through every class of TransformerLens: fingerprint, tokenizer, activations; nothing else travels."
    for name, _, _, model in lens_models(arch):
        v = view(model)
        v.fingerprint
        v._fingerprint = v._fingerprint[0], "wrong"
        other = recipe_of(model).load("cpu")
        v._fingerprint = None
        assert view(model) is v and view(other).describe() == v.describe(), name
        if arch == "llama" and v.is_bridge:
            attend(model, "sdpa")
            assert view(recipe_of(model).load("cpu")).describe() == v.describe()
        a, b = (record(m, {"en": ["abc def ghi jkl"] * 3}, length=8, progress=False) for m in (model, recipe_of(model).load("cpu")))
        assert torch.equal(a.count_pos, b.count_pos) and torch.equal(a.moments["sum"], b.moments["sum"])
