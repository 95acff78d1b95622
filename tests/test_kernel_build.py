"""Building kernels: twice at once, without a compiler, and where others have a hand in the cache.
"""
import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from sprout_lab.kernels import build

root = Path(__file__).resolve().parent.parent
SOURCE = "#include <stdint.h>\nint64_t answer(void) { return 42; }\n"
OTHER = SOURCE.replace("42", "13")
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="needs a C compiler")
posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")


def mode(path): return stat.S_IMODE(path.stat().st_mode)


def answer_of(source=SOURCE):
    "Builds or loads, as a new process would."
    build._libraries.pop(source, None)
    library = build.load_c(source, "answer")
    return library.answer()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "The folder of a cache of the test's own."
    monkeypatch.setenv("SPROUT_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_libraries", {})
    return tmp_path / "cache" / "kernels"


# ---- the same numbers everywhere ----------------------------------------------------------------

PROBE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from sprout_lab.kernels.scan import gated_scan
    from sprout_lab.kernels.bitlinear import bit_linear
    from sprout_lab.kernels.normgate import norm_gate, silu_gate
    from sprout_lab.kernels.ternary import TernaryWeight, ternary_linear
    torch.manual_seed(0)
    f, i, w, n = torch.rand(2, 9, 48), torch.randn(2, 9, 48), 0.02 * torch.randn(24, 48), torch.ones(48)
    h = gated_scan(f, i)[0]
    y = bit_linear(norm_gate(i, h, n), w, n)
    with torch.no_grad(): z = ternary_linear(i[:1, :1], TernaryWeight.of(w), n)
print("numbers", *(f"{t.double().abs().sum():.3f}" for t in (h, y, z)))
plain = sum("kernels run in plain torch" in str(w.message) for w in caught)
print("warnings", plain, len([w for w in caught if w.category is RuntimeWarning]))
"""


def probe(**environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), **environment}
    return subprocess.Popen([sys.executable, "-c", PROBE], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def answer(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return dict(line.split(" ", 1) for line in out.strip().splitlines())


def test_the_same_numbers_from_all(tmp_path):
    "Two processes at once, torn libraries, no compiler, and caches that cannot be used."
    cache, empty, a_file, everyone = (tmp_path / name
                                      for name in ("cache", "empty", "file", "everyone"))
    empty.mkdir()
    a_file.write_text("not a folder")
    (everyone / "kernels").mkdir(parents=True)
    (everyone / "kernels").chmod(0o777)
    started = [probe(SPROUT_LAB_CACHE=str(cache)) for _ in range(2)]
    answers = {f"process {k}": answer(process) for k, process in enumerate(started)}
    assert not list((cache / "kernels").glob(".building-*")), "a half-built library was left behind"
    for library in (cache / "kernels").glob("*.so"):
        assert mode(library) == 0o700
        library.write_bytes(library.read_bytes()[:2000])       # torn: mapping it would be SIGBUS
    started = {"torn": probe(SPROUT_LAB_CACHE=str(cache)),
               "no compiler": probe(SPROUT_LAB_CACHE=str(tmp_path / "none"), PATH=str(empty),
                                    CC="")}
    answers |= {name: answer(process) for name, process in started.items()}
    started = {"a file": probe(SPROUT_LAB_CACHE=str(a_file)),
               "everyone's": probe(SPROUT_LAB_CACHE=str(everyone))}
    answers |= {name: answer(process) for name, process in started.items()}
    assert len({a["numbers"] for a in answers.values()}) == 1, answers
    assert not list((everyone / "kernels").iterdir()), "others can write there"
    if build.compiler() is not None:
        assert answers.pop("no compiler")["warnings"] == "1 1"
        assert all(a["warnings"] == "0 0" for a in answers.values()), answers


# ---- the folder ---------------------------------------------------------------------------------

@posix
@needs_compiler
@pytest.mark.parametrize("mask", (0o000, 0o022, 0o777))
def test_the_folder_is_the_users_alone(cache, mask):
    before = os.umask(0o022)
    cache.parent.mkdir()
    os.umask(mask)
    try: assert answer_of() == 42
    finally: os.umask(before)
    assert mode(cache) == 0o700 and len(list(cache.iterdir())) == 1


@posix
@needs_compiler
def test_a_readable_folder_is_closed(cache):
    cache.mkdir(parents=True)
    cache.chmod(0o755)
    assert answer_of() == 42 and mode(cache) == 0o700


@posix
@needs_compiler
@pytest.mark.parametrize("permissions", (0o777, 0o770, 0o1777))
def test_a_folder_that_others_can_write_is_not_used(cache, permissions):
    cache.mkdir(parents=True)
    cache.chmod(permissions)
    assert answer_of() == 42 and not list(cache.iterdir())


@posix
@needs_compiler
def test_a_folder_of_somebody_elses_is_not_used(cache, monkeypatch):
    answer_of()
    kept = set(cache.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(build.os, "geteuid", lambda: 4242)
        with pytest.raises(PermissionError, match="can be written by others"):
            build._open_private(cache)
    if os.geteuid() == 0:
        os.chown(cache, 4242, 4242)
        assert answer_of(OTHER) == 13 and set(cache.iterdir()) == kept


@posix
@needs_compiler
def test_links_are_not_followed(cache, tmp_path):
    "Neither the folder nor a library may be one; a link's target is left as it is."
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    cache.parent.mkdir()
    cache.symlink_to(target)
    assert answer_of() == 42 and not list(target.iterdir())
    cache.unlink()
    answer_of(OTHER)
    (other,) = cache.iterdir()
    kept = target / "other.so"
    other.rename(kept)
    answer_of()
    (mine,) = cache.iterdir()
    mine.unlink()
    mine.symlink_to(kept)
    assert answer_of() == 42 and not mine.is_symlink() and kept.exists()


@posix
@needs_compiler
@pytest.mark.parametrize("damage", ("cut", "flipped", "empty", "another", "fifo", "writable"))
def test_a_library_is_what_its_name_says(cache, damage):
    answer_of(OTHER)
    (other,) = cache.iterdir()
    content = other.read_bytes()
    other.unlink()
    answer_of()
    (library,) = cache.iterdir()
    whole = library.read_bytes()
    if damage == "cut": library.write_bytes(whole[:len(whole) // 2])
    elif damage == "flipped":
        library.write_bytes(whole[:700] + bytes([whole[700] ^ 255]) + whole[701:])
    elif damage == "empty": library.write_bytes(b"")
    elif damage == "another": library.write_bytes(content)
    elif damage == "writable": library.chmod(0o777)
    else:
        library.unlink()
        os.mkfifo(library)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer_of() == 42
    (library,) = cache.iterdir()
    assert mode(library) == 0o700 and library.read_bytes() == whole


@posix
@needs_compiler
def test_the_folder_checked_is_the_folder_used(cache, tmp_path, monkeypatch):
    """Somebody who can rename folders above puts another in its place after the check: it is not
    read."""
    answer_of()
    (library,) = cache.iterdir()
    answer_of(OTHER)
    evil = tmp_path / "evil"
    evil.mkdir()
    (other,) = set(cache.iterdir()) - {library}
    (evil / library.name).write_bytes(other.read_bytes())
    names = build._Store.names
    def swapped(store, prefix):
        if cache.exists() and not (tmp_path / "away").exists():
            cache.rename(tmp_path / "away")
            evil.rename(cache)
        return names(store, prefix)
    monkeypatch.setattr(build._Store, "names", swapped)
    assert answer_of() == 42


# ---- the environment ----------------------------------------------------------------------------

@posix
@needs_compiler
@pytest.mark.parametrize("name, kind",
                         [("TMPDIR", "everyone's"), ("TMPDIR", "a file"), ("TMPDIR", "missing"),
                                        ("XDG_CACHE_HOME", "everyone's"),
                          ("XDG_CACHE_HOME", "a link")])
def test_other_folders_of_the_environment_do_not_matter(tmp_path, name, kind):
    "Nothing is left in them; the cache is below the home, private and complete."
    folder, home = tmp_path / "folder", tmp_path / "home"
    home.mkdir()
    if kind == "everyone's":
        folder.mkdir()
        folder.chmod(0o777)
    elif kind == "a link": folder.symlink_to("/")
    elif kind == "a file": folder.write_text("")
    inherited = {k: v for k, v in os.environ.items() if k not in ("SPROUT_LAB_CACHE", "TMPDIR")}
    environment = {**inherited, "HOME": str(home), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1",
                   name: str(folder)}
    code = (f"from sprout_lab.kernels.build import load_c; print(load_c({SOURCE!r}, "
            f"'answer').answer())")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment,
                          cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "42", done.stderr
    kernels = home / ".cache" / "sprout-lab" / "kernels"
    assert mode(kernels) == 0o700 and len(list(kernels.iterdir())) == 1
    if kind == "everyone's": assert not [f for f in folder.iterdir() if "torch" not in f.name]


@posix
@needs_compiler
def test_the_compilers_own_files_are_private(cache, tmp_path, monkeypatch):
    "What it keeps in between could be exchanged in a folder of everyone's."
    told, script = tmp_path / "told", tmp_path / "cc"
    script.write_text(f'#!/bin/sh\necho "$TMPDIR" >> {told}\nexec {build.compiler()[0]} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(build, "compiler", lambda: (str(script), "wrapped"))
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert answer_of() == 42 and told.read_text().split() == [str(cache)]


@needs_compiler
def test_without_a_home_or_a_cache_it_is_built_for_this_process(cache, tmp_path, monkeypatch):
    monkeypatch.delenv("SPROUT_LAB_CACHE")
    def nobody(): raise RuntimeError("Could not determine home directory.")
    monkeypatch.setattr(build.Path, "home", nobody)
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    assert answer_of() == 42 and not list(tmp_path.glob("sprout-lab-*"))


@needs_compiler
def test_forty_kernels_are_forty_libraries(cache):
    "The loader knows libraries by their paths; each has one of its own."
    sources = [SOURCE.replace("42", str(k)) for k in range(40)]
    assert [build.load_c(source, "answer").answer() for source in sources] == list(range(40))
    again = [answer_of(source) for source in sources]
    assert again == list(range(40)) and len(list(cache.iterdir())) == 40


def test_a_compiler_that_fails_is_told_once(cache, monkeypatch):
    monkeypatch.setattr(build, "compiler", lambda: (sys.executable, "not a compiler"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert build.load_c(SOURCE + " ", "answer") is None
        assert build.load_c(SOURCE + " ", "answer") is None
    (warning,) = caught
    assert ("cannot build the kernel answer" in str(warning.message)
            and "\n" not in str(warning.message))
