"""A notebook-first lab for five families of small language models. Importing it alone loads no torch."""
__version__ = "0.1.0"

_elsewhere = {"SproutLanguageModel": "sprout_lab.models.sprout"}   # a guide's name, found when it is asked for


def __getattr__(name):
    if name not in _elsewhere: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(_elsewhere[name]), name)
