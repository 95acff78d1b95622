"""Packaging: everything it says stands in settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
lines = lambda key: [line.strip() for line in settings[key].splitlines() if line.strip()]
words = lambda key: settings[key].split()
address = f"https://github.com/{settings['user']}/{settings['repo']}"

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
    packages=find_packages(include=["sprout_lab", "sprout_lab.*"]),
    include_package_data=True,
    install_requires=lines("requirements"),
    extras_require={"dev": lines("dev_requirements"), "wandb": lines("wandb_requirements"),
                    "sentencepiece": words("sentencepiece_requirements"), "evaluation": lines("evaluation_requirements"),
                    "serve": words("serve_requirements")},
    entry_points={"console_scripts": lines("console_scripts") + lines("dev_console_scripts"),
                  "nbdev": ["sprout_lab=sprout_lab._modidx:d"]},
)
