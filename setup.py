"""Packaging: everything it says stands in settings.ini."""
import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
lines = lambda key: [line.strip() for line in settings[key].splitlines() if line.strip()]
words = lambda key: settings[key].split()
address = f"https://github.com/{settings['user']}/{settings['repo']}"
# nbdev's commands are for those who work on the notebooks, who install the checkout itself (pip install -e)
dev_scripts = lines("dev_console_scripts") if {"editable_wheel", "develop"} & set(sys.argv) else []

setup(
    version=settings["version"],
    description=settings["description"],
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    license="Apache-2.0",
    keywords=words("keywords"),
    url=address,
    project_urls={"Repository": address},
    # presets and corpora lie in folders without code
    packages=find_namespace_packages(include=["sprout_lab", "sprout_lab.*"], exclude=["*.__pycache__*"]),
    include_package_data=True,
    install_requires=lines("requirements"),
    extras_require={"dev": lines("dev_requirements"), "wandb": lines("wandb_requirements"),
                    "sentencepiece": words("sentencepiece_requirements"), "evaluation": lines("evaluation_requirements"),
                    "serve": words("serve_requirements"),
                    "sweep": words("sweep_requirements"), "ray": words("ray_requirements"),
                    "app": words("app_requirements"), "masks": words("masks_requirements")},
    entry_points={"console_scripts": lines("console_scripts") + dev_scripts,
                  "nbdev": ["sprout_lab=sprout_lab._modidx:d"]},
)
