"Command line: fast help, one line and exit code 2 on wrong input, the whole way on a tiny model."
import os
import signal
import subprocess
import sys
import time
import warnings

import pandas as pd
import pytest

from langneuron_mi.cli import commands, main
from langneuron_mi.find.language_neurons import LanguageNeurons
from langneuron_mi.testing.planted import planted_model


def test_cli_help_imports_nothing_heavy():
    heavy = {"torch", "transformers", "transformer_lens", "pandas", "plotly"}
    code = f"import sys; from langneuron_mi.cli import main; main(['--help']); print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "usage: langneuron" in out and out.strip().endswith("[]")
    for name in commands:
        assert name in out


@pytest.mark.parametrize("name", list(commands))
def test_cli_every_command_has_help_and_refuses_unknown_options(name, capsys):
    with pytest.raises(SystemExit) as end: main([name, "--help"])
    assert not end.value.code and "usage: langneuron" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end: main([name, "--no-such-option", "1"])
    assert end.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("argv, words", [
    (["recrod"], "did you mean 'record'"),
    (["demo", "--langs", "en,ger"], "did you mean"),
    (["demo", "--tokens", "many"], "--tokens: got 'many'; give a whole number"),
    (["demo", "--langs", "en de"], "no language 'en de'"),
    (["identify", "x", "neurons.csv"], ".safetensors"),
    (["record", "gemma-3-270m", "bible", "en,ger", "x"], "no language 'ger'"),
    (["record", "gemma-3-270m", "/no/such/folder", "en,de", "x"], "/no/such/folder"),
    (["identify", "/no/such/file", "x.safetensors"], "/no/such/file"),
    (["perplexity", "m", "/no/such/neurons", "bible", "x.csv"], "/no/such/neurons"),
    (["perplexity", "m", "n", "bible", "x.csv", "--controls=-1"], "--controls -1: give a number of random sets, 0 or more"),
    (["compare", "/no/such.toml"], "no experiment file /no/such.toml; give a TOML file"),
    (["record", "./no_model", "bible", "en", "x", "--batch-size", "0"], "batch_size=0: give 1 or more windows"),
    (["record", "./no_model", "bible", "en", "x", "--shard-size", "0"], "shard_size=0: give 1 or more windows"),
    (["record", "./no_model", "bible", "en", "x", "--tokens=-5"], "tokens=-5: give 1 or more"),
    (["record", "./no_model", "bible", "en", "x", "--layout", "foo"], "allowed are 'packed' and 'texts'"),
    (["record", "./no_model", "bible", "en", "x", "--workers", "2"], "add --engine ray"),
    (["record", "./no_model", "bible", "en", "x", "--batchsize", "2"], "did you mean 'batch_size'"),
    (["identify", "x", "x.safetensors", "--n", "5"], "lape has no option n"),
    (["steer", "demo", "--factor", "x3"], "did you mean 'factors'"),
    (["eval", "m", "xcopa_it", "x", "--controls", "2"], "--controls is of a matrix"),
    (["record", "./no_model", "bible", "en", "x"], "no folder ./no_model; give a folder with config.json"),
    (["info", __file__], "is no safetensors file; give a file that this package wrote"),
    (["report", "/no/such"], "/no/such"),
    (["info", "/no/such"], "/no/such"),
])
def test_cli_wrong_input_exits_2_with_one_line(argv, words, capsys):
    try:
        code = main(argv)
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err.strip()
    assert code == 2 and words in err and len(err.splitlines()) == 1


def test_cli_the_whole_way(tmp_path, capsys):
    p = planted_model()
    p.hf.save_pretrained(tmp_path / "model")
    p.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text").mkdir()
    for lang, lines in p.texts(300, seed=0).items():
        (tmp_path / "text" / f"{lang}.txt").write_text("\n".join(lines), encoding="utf-8")
    model, text = str(tmp_path / "model"), str(tmp_path / "text")
    assert main(["record", model, text, "en,de,fr", str(tmp_path / "run"), "--tokens", "500", "--held-out", "0.1"]) == 0
    assert main(["identify", str(tmp_path / "run"), str(tmp_path / "neurons.safetensors")]) == 0
    assert main(["perplexity", model, str(tmp_path / "neurons.safetensors"), text, str(tmp_path / "ppl.csv"), "--tokens", "60"]) == 0
    df = pd.read_csv(tmp_path / "ppl.csv")
    own = df[(df.method == "lape") & (df.neurons_of == df.text_lang)]
    assert (own.ratio > 3).all() and set(df.method) == {"none", "lape", "random"}
    found = LanguageNeurons.load(tmp_path / "neurons.safetensors")
    assert all(r.n_neurons == (0 if r.method == "none" else len(found[r.neurons_of])) for r in df.itertuples())
    assert f"{len(df)} rows" in capsys.readouterr().out
    assert (
        main(
            ["perplexity", model, str(tmp_path / "neurons.safetensors"), text, str(tmp_path / "seen.csv"), "--tokens", "60", "--seed", "5"]
        )
        == 2
    )
    assert "the same --held_out and --seed as in record" in capsys.readouterr().err
    assert (
        main(
            [
                "eval",
                model,
                "xcopa_it",
                str(tmp_path / "eval"),
                "--neurons",
                str(tmp_path / "neurons.safetensors"),
                "--lang",
                "fr",
                "--edit",
                "zap",
            ]
        )
        == 2
    )
    assert "'zap'" in capsys.readouterr().err  # before tasks and model are loaded
    assert main(["info", str(tmp_path / "neurons.safetensors")]) == 0
    assert '"kind"' in capsys.readouterr().out
    config = f'model = "{model}"\ncorpus = "{text}"\nlangs = ["en", "de", "fr"]\ntokens = 400\n'
    config += f'held_out_tokens = 60\nnew_tokens = 3\nout = "{tmp_path / "exp"}"\n'
    (tmp_path / "e.toml").write_text(config)
    assert main(["compare", str(tmp_path / "e.toml")]) == 0
    assert (tmp_path / "exp/report.html").exists()
    assert list(pd.read_csv(tmp_path / "exp/tables/perplexity.csv").columns) == [
        "method",
        "neurons_of",
        "text_lang",
        "ratio",
        "low",
        "high",
        "n_tokens",
    ]
    assert main(["report", str(tmp_path / "exp")]) == 0
    (tmp_path / "e.toml").write_text(config.replace("tokens = 400", "tokenz = 400"))
    assert main(["compare", str(tmp_path / "e.toml")]) == 2


def test_cli_warnings_are_one_line_each(monkeypatch, capsys):
    monkeypatch.setitem(commands, "info", lambda artifact: warnings.warn("two\nlines") or "done")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["info", "x"]) == 0
    assert capsys.readouterr() == ("done\n", "langneuron info: warning: two lines\n")


def test_cli_sigterm_ends_as_ctrl_c_does(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(commands, "info", lambda artifact: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5))
    assert main(["info", "x"]) == 130 and capsys.readouterr().err == "langneuron info: stopped by SIGTERM\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_cli_options_are_the_fields_and_read_their_own_defaults():
    from dataclasses import MISSING, fields
    from langneuron_mi.core.shell import options, read_command, readable
    from langneuron_mi.core.settings import annotations

    for name, (concern, needed) in dict(
        demo=("fields", []),
        steer=("fields", ["demo"]),
        share=("fields", ["cldr"]),
        tune=("fields", ["x.toml"]),
        perplexity=("measured", list("abcd")),
        record=("recording", list("abcd")),
    ).items():
        (cls,) = commands[name].concerns[concern]()
        defaults = {f.name: f.default for f in fields(cls) if readable(annotations(cls)[f.name]) and f.default is not MISSING}
        assert set(defaults) == set(options(cls)) and len(defaults) > 3
        words = {k: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for k, v in defaults.items() if k not in ("out", "prompts")}
        told = read_command(commands[name], [*needed, *(f"--{k}={w}" for k, w in words.items())])[concern]
        assert told == {k: defaults[k] for k in words}
