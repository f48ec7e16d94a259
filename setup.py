"Reads everything from settings.ini, so that the version and the requirements are written in one place."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

def requirements(key): return [r for r in cfg.get(key, "").split() if r]

extras = {name: requirements(f"{name}_requirements") for name in ["demo", "eval", "tune", "scale", "quantised", "dev"]}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    packages=find_packages(include=["langneuron_mi", "langneuron_mi.*"]),
    package_data={"langneuron_mi": ["py.typed"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=requirements("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
        "lm_eval.models": ["langneuron=langneuron_mi.measure.task_model:LangNeuronLM"],
    },
    zip_safe=False,
)
