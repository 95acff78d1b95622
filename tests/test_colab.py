"""The Colab notebooks: in step with their generator, links that lead somewhere, and a run from
install to download in an environment of its own."""
import base64
import configparser
import csv
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

root = Path(__file__).parent.parent
ini = configparser.ConfigParser(delimiters=["="])
ini.read(root / "settings.ini", encoding="utf-8")
user, repo, branch = (ini["DEFAULT"][key] for key in ("user", "repo", "branch"))
FLEET = sorted((root / "colab").glob("*.ipynb"))
NOTEBOOKS = [*FLEET, *sorted(p for p in (root / "nbs").rglob("*.ipynb")
                             if ".ipynb_checkpoints" not in p.parts)]


@pytest.fixture(scope="module")
def generator():
    sys.path.insert(0, str(root / "tools"))
    try: import colab
    finally: sys.path.pop(0)
    return colab


def test_the_fleet_is_what_its_generator_says(generator):
    assert generator.out_of_step() == []
    from sprout_lab.families import families
    assert {p.stem for p in FLEET} == {*families, "compare"}


def test_a_fork_changes_one_line(generator, monkeypatch):
    monkeypatch.setattr(generator, "address",
                        lambda: {"user": "someone", "repo": "fork", "branch": "trial"})
    text = generator.notebook("transformer")
    assert ("github.com/someone/fork@trial" in text
            and "github/someone/fork/blob/trial/colab/transformer.ipynb" in text)
    assert f"{user}/{repo}" not in text


@pytest.mark.parametrize("path", FLEET, ids=lambda p: p.stem)
def test_form(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.metadata["accelerator"] == "GPU"
            and notebook.metadata["colab"]["gpuType"] == "T4"
            and notebook.metadata["colab"]["provenance"] == [])
    code = [c.source for c in notebook.cells if c.cell_type == "code"]
    assert all(not c.get("outputs") and c.get("execution_count") is None
               for c in notebook.cells if c.cell_type == "code")
    installs = [line for source in code for line in source.splitlines() if "pip" in line
                and not line.lstrip().startswith("#")]
    # one, and nothing of Colab's is replaced
    assert installs == [f'    %pip install -q "git+https://github.com/{user}/{repo}@{branch}"']
    assert re.search(r"USE_DRIVE = False  #@param", "\n".join(code))
    panel = re.search(r"SHOW_PANEL = False  #@param", "\n".join(code))
    assert panel or path.stem == "compare"   # it has no panel
    assert "{{" not in path.read_text(encoding="utf-8")
    for source in code:   # forms are understood by Colab only in one line
        for line in source.splitlines():
            assert "#@param" not in line or re.fullmatch(r"[A-Z_]+ = \S.*  #@param "
                                                         r"(\{.*\}|\[.*\]( \{.*\})?)", line), line


def texts(path: Path) -> list[str]:
    "A notebook's markdown, or a page's text."
    if path.suffix == ".md": return [path.read_text(encoding="utf-8")]
    return ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
            if c["cell_type"] == "markdown"]


@pytest.mark.parametrize("path", [root / "README.md", *NOTEBOOKS],
                         ids=lambda p: p.relative_to(root).as_posix())
def test_links_and_badges(path):
    text = "\n".join(texts(path))
    for key, value in (("{user}", user), ("{repo}", repo), ("{branch}", branch)):
        text = text.replace(key, value)
    ours = re.findall(r"colab\.research\.google\.com/github/([\w.-]+)/([\w.-]+)/blob/([\w.-]+)/([^\s)\"'#]+)", text)
    files = re.findall(
        r"github\.com/([\w.-]+)/([\w.-]+)/(?:blob|tree|raw)/([\w.-]+)/([^\s)\"'#]+)", text)
    ours += [found for found in files if repo in found[:2] or user in found[:2]]
    for owner, name, at, target in ours:
        assert (owner, name, at) == (user, repo,
                                     branch), f"{owner}/{name}@{at}: settings.ini says {user}/{repo}@{branch}"
        assert (root / target).exists(), f"{target} is not in the repository"
    for owner, name, at in re.findall(r"git\+https://github\.com/([\w.-]+)/([\w.-]+)@([\w.-]+)",
                                      text):
        assert (owner, name, at) == (user, repo, branch)
    prose = re.sub(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", prose):
        target = "".join(target).split("#")[0]
        # a place in the page, or another machine's
        if not target or re.match(r"\w+:", target): continue
        assert (path.parent / target).exists(), (f"{target} does not exist beside "
                                                 f"{path.relative_to(root)}")


# ---- the notebook in an environment of its own

@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A virtual environment that has everything the lab needs, except the lab; a repository at the
    public address; a kernel there that takes itself
    for Colab's or not. `clean(colab)` → a function that runs a notebook."""
    if shutil.which("git") is None or not (root / ".git").exists():
        pytest.skip("needs git and a checkout")
    home = tmp_path_factory.mktemp("colab")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "venv"], check=True)
    # this environment's packages by link, so that nothing is downloaded
    packages = home / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not re.match(r"(__editable__.*)?sprout[_-]lab|.*\.pth$|__pycache__",
                        path.name.removeprefix("_")):
            (packages / path.name).symlink_to(path)
    site = next((home / "venv").glob("lib/python*/site-packages"))
    (site / "packages.pth").write_text(f"{packages}\n")

    # what git sees here, committed or not, on the branch that settings.ini names
    checkout = home / "checkout"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root,
                            capture_output=True, text=True, check=True).stdout.split("\0")
    for name in listed:
        if not name or not (root / name).is_file(): continue
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, checkout / name)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q", "-b", branch], ["add", "-A"],
                    ["commit", "-q", "-m", "checkout"]):
        subprocess.run([*git, *command], cwd=checkout, check=True)

    environment = {"SPROUT_LAB_QUICK": "1", "SPROUT_LAB_CACHE": str(home / "cache"),
                   "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg",
                   "PYTHONPATH": "", "CI": "",
                   "COLAB_STAND_IN": str(home / "asked"), "PIP_ROOT_USER_ACTION": "ignore",
                   "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_CONFIG_FILE": os.devnull,
                   "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{checkout}.insteadOf",
                   "GIT_CONFIG_VALUE_0": f"https://github.com/{user}/{repo}"}
    # 0: pip reads it the other way round
    if (packages / "setuptools").exists() and (packages / "wheel").exists():
        environment |= {"PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"}
    else: environment.pop("PIP_CONFIG_FILE")   # the wheel is built with tools from the registry
    for name, extra in (("colab", {"PYTHONPATH": str(root / "tests/colab_stand_in")}),
                        ("elsewhere", {})):
        (home / "kernels" / name).mkdir(parents=True)
        (home / "kernels" / name / "kernel.json").write_text(json.dumps(
            {"argv": [str(home / "venv/bin/python"), "-W", "default", "-m", "ipykernel_launcher",
                      "-f", "{connection_file}"], "display_name": name, "language": "python",
             "env": {**environment, **extra}}))

    with stand_in_for_the_hub() as (address, pushed):
        spec = home / "kernels/colab/kernel.json"
        described = json.loads(spec.read_text())
        described["env"] |= {"HF_ENDPOINT": address, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0",
                             "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        spec.write_text(json.dumps(described))
        run = notebook_runner(home)
        run.home, run.pushed = home, pushed
        yield run


@contextmanager
def stand_in_for_the_hub():
    """An endpoint on this machine that takes what the Hub's client sends: yields its address and
    the files that were pushed, as `{name of the repository: {file: bytes}}`."""
    pushed = {}

    class Endpoint(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked = self.rfile.read(int(self.headers.get("content-length", 0)))
            answer = {}
            if self.path == "/api/repos/create":
                made = json.loads(asked)
                answer = {"url": f"{address}/{made['organization']}/{made['name']}"}
            elif self.path.endswith("/preupload/main"):
                answer = {"files": [{"path": file["path"], "uploadMode": "regular",
                                     "shouldIgnore": False} for file in json.loads(asked)["files"]]}
            elif self.path.endswith("/commit/main"):
                name = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
                lines = [json.loads(line) for line in asked.splitlines()]
                files = [line["value"] for line in lines if line["key"] == "file"]
                pushed[name] = {f["path"]: base64.b64decode(f["content"]) for f in files}
                answer = {"commitUrl": f"{address}/{name}/commit/0", "commitOid": "0"}
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_): pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield address, pushed
    finally:
        server.shutdown()
        server.server_close()


def notebook_runner(home: Path):
    "`run(notebook, kernel, folder, kill_when)`: see `clean`."
    def run(notebook, kernel: str, folder: Path, kill_when=None):
        """Execute `notebook` in `folder`; `kill_when()` true kills its kernel at once. Returns the
        text that it printed."""
        from jupyter_client.kernelspec import KernelSpecManager
        from jupyter_client.manager import AsyncKernelManager
        from nbclient import NotebookClient
        folder.mkdir(exist_ok=True)
        manager = AsyncKernelManager(kernel_name=kernel,
                                     kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(home / "kernels")]))
        client, over = NotebookClient(notebook, km=manager, timeout=300,
                                      resources={"metadata": {"path": str(folder)}}), threading.Event()

        def watch():
            while not over.is_set():
                if kill_when(): return os.kill(manager.provisioner.pid, signal.SIGKILL)
                time.sleep(0.005)
        if kill_when: threading.Thread(target=watch, daemon=True).start()
        try: client.execute()
        finally:
            over.set()
            from jupyter_client.utils import run_sync
            run_sync(manager.shutdown_kernel)(now=True)
        outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
        said = "".join(o.text for o in outputs if o.output_type == "stream")
        wrong = [o for o in outputs if o.get("name") == "stderr" or o.output_type == "error"]
        assert not wrong, said
        assert not re.search(r"Warning|Traceback", said), said
        return said
    return run


def switched_on(notebook, home: Path, *switches: str):
    "With these switches on, and Drive at a place that a test may write to."
    for cell in notebook.cells:
        cell.source = re.sub(rf"^({'|'.join(switches)}) = False", r"\1 = True", cell.source,
                             flags=re.MULTILINE)
        cell.source = cell.source.replace("/content/drive", str(home / "drive"))
        cell.source = cell.source.replace('PUSH_TO_HUB = ""', 'PUSH_TO_HUB = "you/a-model"')
    return notebook


def installed(home: Path) -> None:
    "The lab in the environment of its own, where no notebook has put it there yet."
    if next((home / "venv").glob("lib/python*/site-packages/sprout_lab"), None): return
    command = [sys.executable, "-m", "pip", "--python", home / "venv/bin/python", "install", "-q",
               "--no-deps", "--no-build-isolation", home / "checkout"]
    subprocess.run(command, check=True)


def read(name="transformer"): return nbformat.read(root / f"colab/{name}.ipynb", as_version=4)


def torch_equal(one, other) -> list[bool]:
    "Of each tensor of a model whether it is the other's."
    theirs = other.state_dict()
    return [bool((tensor == theirs[name]).all()) for name, tensor in one.state_dict().items()]


def steps(run: Path) -> list[tuple]:
    "What the training log says, times left out."
    with open(run / "logs/training_log.csv", encoding="utf-8", newline="") as file:
        return [tuple(r[k] for k in ("step", "tokens", "loss", "grad_norm", "learning_rate"))
                for r in csv.DictReader(file)]


def test_top_to_bottom_as_in_colab_and_on_after_a_kill_elsewhere(clean):
    """One test, because the second half needs what the first one installed and compares with what
    it trained."""
    from nbclient.exceptions import DeadKernelError
    home, name = clean.home, "transformer-nano-shakespeare"
    # every switch on; the install cell stays as it is
    notebook = switched_on(read(), home, "USE_DRIVE", "SHOW_PANEL", "SHOW_PLAYGROUND", "EXPORT")
    said = clean(notebook, "colab", home / "in_colab")
    assert sum("widget-view" in kind for c in notebook.cells for o in c.get("outputs", [])
               for kind in o.get("data",
                                 {})) == 2, "the panel and the playground are there, and wait for no one"
    run = home / "drive/MyDrive/sprout-lab" / name
    assert ((run / "checkpoints/step_40/model.safetensors").is_file()
            and "finished at step 40" in said and "bits per byte   gzip" in said)
    library = (home / "venv").glob("lib/python*/site-packages/sprout_lab/families.py")
    assert next(library), "the install cell installed the lab"
    assert (home / "asked").read_text().splitlines() == [f"mount {home / 'drive'}",
                                                         f"download {name}.zip"]
    with zipfile.ZipFile(home / f"in_colab/{name}.zip") as archive:
        archive.extractall(home / "unpacked")
    from sprout_lab.families import load_model
    model, tokenizer = load_model(home / "unpacked" / name, log=lambda words: None)
    assert tokenizer.encode("a") and model.config.num_hidden_layers
    # what was exported is the best checkpoint, and was pushed whole, with its card
    exported = {file.name: file.read_bytes() for file in (run / "export").iterdir()}
    assert clean.pushed == {"you/a-model": exported} and "pushed you/a-model" in said
    assert "model.safetensors" in exported and b"bits per byte" in exported["README.md"]
    copy, _ = load_model(run / "export")
    assert all(torch_equal(copy, model))
    assert "has no ternary layers" in said and not (run / "export-ternary").exists()

    second = home / "elsewhere/runs" / name   # the same training, killed between two checkpoints
    log = second / "logs/training_log.csv"
    with pytest.raises(DeadKernelError):
        clean(read(), "elsewhere", home / "elsewhere",
              kill_when=lambda: (second / "checkpoints/step_10").exists() and log.exists()
              and len(log.read_text().splitlines()) > 3)
    assert not (second / "checkpoints/step_40").exists()
    said = clean(read(), "elsewhere", home / "elsewhere")
    assert re.search(r"resumed from step_\d0", said) and "finished at step 40" in said
    assert steps(second) == steps(run) and [row[0] for row in steps(second)] == [str(s)
                                                                                 for s in range(5,
                                                                                                41,
                                                                                                5)]
    weights = "checkpoints/step_40/model.safetensors"
    assert (second / weights).read_bytes() == (run / weights).read_bytes()
    assert len((home / "asked").read_text().splitlines()) == 2, ("outside Colab nothing is "
                                                                 "mounted and nothing downloaded")


def test_a_tree_killed_while_it_grows_goes_on_as_the_same_tree(clean):
    """The same for the family whose model changes its shape: two runs of its notebook, one killed
    in the middle of the growth."""
    from nbclient.exceptions import DeadKernelError
    home, name = clean.home, "sprout-nano-shakespeare"
    installed(home)
    said = clean(read("sprout"), "elsewhere", home / "whole")
    whole, torn = home / "whole/runs" / name, home / "torn/runs" / name
    assert ("Node limit reached: 5/5 nodes" in said and "finished at step 40" in said
            and "nats per hidden token" in said)
    assert ((whole / "results/growth.html").is_file()
            and (whole / "results/growth.gif").read_bytes()[:4] == b"GIF8")
    log = torn / "logs/tree_log.csv"
    # after the first growth (step 8) and before the last one (step 32)
    with pytest.raises(DeadKernelError):
        clean(read("sprout"), "elsewhere", home / "torn",
              kill_when=lambda: (torn / "checkpoints/step_10").exists() and log.exists()
              and "\n15," in log.read_text())
    assert not (torn / "checkpoints/step_30").exists()
    said = clean(read("sprout"), "elsewhere", home / "torn")
    assert re.search(r"resumed from step_\d0", said) and "finished at step 40" in said
    assert (steps(torn) == steps(whole)
            and log.read_text() == (whole / "logs/tree_log.csv").read_text())
    weights = "checkpoints/step_40/model.safetensors"
    assert (torn / weights).read_bytes() == (whole / weights).read_bytes()
    tree = json.loads((torn / "checkpoints/step_40/config.json").read_text())
    assert (len(tree["tree"]) == 5
            and tree == json.loads((whole / "checkpoints/step_40/config.json").read_text()))


# what the notebook's own cells say of a family, and whether it has ternary weights
SAID = {"slm": "bits per byte   gzip", "hnet": "bits per byte   gzip",
        "mot": "bits per byte   gzip",
        "tslm": "series exchanged: "}
TERNARY = {"slm", "hnet"}


@pytest.mark.slow   # three notebooks of a family, each in a process of its own: a minute and more
@pytest.mark.parametrize("family", SAID)
def test_a_killed_notebook_goes_on_and_exports_for_every_family(clean, family):
    from nbclient.exceptions import DeadKernelError
    from sprout_lab.families import families, load_model
    home, name = clean.home, f"{family}-nano-{families[family].default_data}"
    installed(home)
    said = clean(switched_on(read(family), home, "EXPORT"), "colab", home / f"{family}_whole")
    whole, torn = home / f"{family}_whole/runs" / name, home / f"{family}_torn/runs" / name
    assert SAID[family] in said and "judged: step" in said and "finished at step 40" in said
    best, _ = load_model(whole, log=lambda words: None)
    copy, tokenizer = load_model(whole / "export")
    assert all(torch_equal(copy, best)) and tokenizer.encode("a")
    assert set(clean.pushed.pop("you/a-model")) == {f.name for f in (whole / "export").iterdir()}
    assert (whole / "export-ternary").is_dir() == (family in TERNARY)
    if family in TERNARY:
        packed, tokenizer = load_model(whole / "export-ternary")
        ids = tokenizer("To be, or not", return_tensors="pt").input_ids
        assert (packed(ids).logits.argmax(-1) == best(ids).logits.argmax(-1)).all()
    log = torn / "logs/training_log.csv"
    with pytest.raises(DeadKernelError):
        clean(read(family), "elsewhere", home / f"{family}_torn",
              kill_when=lambda: (torn / "checkpoints/step_10").exists() and log.exists()
              and len(log.read_text().splitlines()) > 3)
    assert not (torn / "checkpoints/step_40").exists()
    said = clean(read(family), "elsewhere", home / f"{family}_torn")
    assert re.search(r"resumed from step_\d0", said) and "finished at step 40" in said
    weights = "checkpoints/step_40/model.safetensors"
    assert steps(torn) == steps(whole)
    assert (torn / weights).read_bytes() == (whole / weights).read_bytes()
