"""The lab as a page, in a real browser, at three widths, light and dark; and the report."""
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow   # a browser and a server: half a minute or more

root = Path(__file__).parent.parent
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SCREENSHOTS = os.environ.get("SPROUT_LAB_SCREENSHOTS")
SIZES = [(1280, 900, "light"), (1920, 1000, "dark"), (390, 844, "dark")]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None: pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "Voilà on this machine, with a home and a folder of runs of its own."
    pytest.importorskip("voila")
    home = tmp_path_factory.mktemp("app")
    shutil.copy(root / "nbs" / "lab.ipynb", home)
    train_a_little(home / "runs" / "first")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "HOME": str(home), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with open(home / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "voila", "lab.ipynb", "--Voila.ip=127.0.0.1", f"--port={port}",
             "--no-browser"], cwd=home, env=env, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}/"
        try:
            _wait(f"{url}static/nothing", process)
            yield url
        finally:
            process.terminate()
            process.wait(20)


def train_a_little(folder):
    "A run for the tabs that show runs."
    from sprout_lab.families import configure, make_trainer
    run = configure("transformer", {
        "output_dir": str(folder), "max_steps": 4, "hidden_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "sequence_length": 32, "batch_size": 4, "eval_batches": 2,
        "final_eval_batches": 2, "tensorboard": False, "sample_tokens": 8, "device": "cpu"},
        log=lambda words: None)
    make_trainer(run, log=lambda words: None).train()


def _wait(url, process):
    for _ in range(240):
        assert process.poll() is None
        try: return urllib.request.urlopen(url, timeout=2)
        except urllib.error.HTTPError: return   # it answers
        except OSError: time.sleep(0.5)


def snap(page, name):
    if SCREENSHOTS: page.screenshot(path=f"{SCREENSHOTS}/{name}.png", full_page=True)


@pytest.mark.parametrize("width, height, scheme", SIZES)
def test_the_app_fits_and_answers(browser, server, width, height, scheme):
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    page.goto(server)
    page.wait_for_selector(".sprout-lab-app button:has-text('Run')")
    page.wait_for_timeout(1500)
    snap(page, f"app-{width}-{scheme}")
    wide, inner = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= inner + 1
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background.strip("rgba()").split(",")[:3])) < 200) == (scheme == "dark")
    for tab, button in (("Pictures", "Draw"), ("Write", "Write")):
        page.locator(f".lm-TabBar-tab:has-text('{tab}')").first.click()
        page.wait_for_selector(f"button:has-text('{button}'):visible")
        if button == "Draw":
            page.locator("button:has-text('Draw'):visible").first.click()
            page.wait_for_selector(".widget-html-content svg:visible")
        snap(page, f"app-{width}-{scheme}-{tab.lower()}")
        wide, inner = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= inner + 1
    page.close()


def test_the_report_fits(browser, tmp_path):
    from sprout_lab.laboratory.comparison import Comparison, ComparisonConfig, train_all
    from sprout_lab.laboratory.report import write_report
    comparison = Comparison(ComparisonConfig(
        families=["transformer", "sprout"], amount=3e9, seeds=2, rates=1, sequence_length=32,
        batch_size=4, evaluations=2, final_eval_batches=2, device="cpu",
        output_dir=str(tmp_path)), log=lambda words: None)
    train_all(comparison)
    path = write_report(comparison, pictures=False)
    for width, height, scheme in SIZES:
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        snap(page, f"report-{width}-{scheme}")
        wide, inner = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= inner and asked == [path.as_uri()]
        assert page.locator("svg").count() >= 3 and page.locator("table").count() >= 4
        page.close()
