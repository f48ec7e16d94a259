"A wheel, installed outside the checkout, is the package: README's ten lines run, and the command line answers."
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def ten_lines():
    "The code under README's heading of ten lines."
    section = (ROOT/"README.md").read_text(encoding="utf-8").split("## Ten lines")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", section, re.S))


def test_wheel_readme_has_ten_lines():
    lines = [l for l in ten_lines().splitlines() if l.strip()]
    assert len(lines) == 10 and max(map(len, lines)) <= 140
    assert len((ROOT/"README.md").read_bytes()) < 7000


@pytest.mark.slow
def test_wheel_runs_the_readme_outside_the_checkout(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(tmp_path)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    (site / "what_it_needs.pth").write_text(
        sysconfig.get_path("purelib")
    )  # torch and the others; a .pth inside that folder, as of the checkout, is not read
    code = ten_lines() + "\nimport langneuron_mi; print(langneuron_mi.__file__, (matrix.to_df().ratio > 3).any())"
    ran = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == f"{site/'langneuron_mi/__init__.py'} True"
    assert (site/"langneuron_mi/py.typed").exists()
    shell = subprocess.run([python, "-m", "langneuron_mi.cli", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert shell.returncode == 0
