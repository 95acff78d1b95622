"""What the oldest Python of settings.ini refuses, found on a newer one."""
import dataclasses
import importlib
import pkgutil

import sprout_lab


def library_classes():
    for info in pkgutil.walk_packages(sprout_lab.__path__, "sprout_lab."):
        if info.name.endswith("_modidx"): continue
        for thing in vars(importlib.import_module(info.name)).values():
            if isinstance(thing, type) and thing.__module__ == info.name: yield thing


def test_no_dataclass_has_a_default_that_python_3_10_calls_mutable():
    "3.10 refuses every list, dict and set as a default; 3.11 only what cannot be hashed."
    classes = [one for one in library_classes() if dataclasses.is_dataclass(one)]
    assert len(classes) > 10
    for one in classes:
        for field in dataclasses.fields(one):
            assert not isinstance(field.default, (list, dict, set)), f"{one.__name__}.{field.name}"
