"""The panel and the playground in a real browser: JupyterLab on this machine, Chromium, clicks."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import matplotlib
import pytest

root = Path(__file__).parent.parent
CHROMIUM = (os.environ.get("CHROMIUM") or shutil.which("chromium")
            or shutil.which("chromium-browser") or shutil.which("google-chrome"))
# a folder: keep pictures of what the browser showed
SCREENSHOTS = os.environ.get("SPROUT_LAB_SCREENSHOTS")

PANEL = """from sprout_lab.panels import panel, playground
p = panel("transformer", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, sequence_length=64,
          batch_size=8, max_steps=5000,
          eval_interval=50, eval_batches=2, save_interval=1000, log_interval=10,
          tensorboard=False, sample_tokens=0, output_dir="run")
p"""
PLAYGROUND = """play = playground(p, prompt="ROMEO:", max_tokens=60, seed=1)
play"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab with a home of its own, and a notebook; yields the notebook's address."
    if CHROMIUM is None: pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    pytest.importorskip("jupyterlab")
    home = tmp_path_factory.mktemp("lab")
    (home / "work").mkdir()
    cells = [{"cell_type": "code", "id": f"cell{i}", "metadata": {}, "source": source,
              "outputs": [], "execution_count": None} for i,
             source in enumerate((PANEL, PLAYGROUND))]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    (home / "work/panel.ipynb").write_text(json.dumps(whole))
    settings = home / ".jupyter/lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "CI" and not k.startswith("JUPYTER")}
    env |= {"HOME": str(home), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1",
            "SPROUT_LAB_CACHE": os.environ["SPROUT_LAB_CACHE"], "JUPYTER_PLATFORM_DIRS": "0",
            # or the first figure waits for a list of all fonts
            "MPLCONFIGDIR": matplotlib.get_cachedir()}
    log = open(home / "server.log", "w")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
                               "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
                               "--IdentityProvider.token=",
                               "--ServerApp.password=", "--KernelManager.shutdown_wait_time=1",
                               f"--ServerApp.root_dir={home / 'work'}"],
                              env=env, stdout=log, stderr=subprocess.STDOUT, cwd=home)
    try:
        for _ in range(150):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2).read(); break
            except OSError:
                assert server.poll() is None, (home / "server.log").read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/doc/tree/panel.ipynb", home
    finally:
        server.terminate()   # shuts its kernels down, too
        try: server.wait(10)
        except subprocess.TimeoutExpired: server.kill()
        log.close()


def state(page, index=0): return page.locator(".sprout-state").nth(index).inner_text()


def step(page) -> int:
    "The step that the panel's table shows."
    shown = page.locator(".sprout-progress")
    return int(re.search(r"step ([\d,]+) of",
                         shown.first.inner_text())[1].replace(",", "")) if shown.count() else -1


def run_cell(page, index):
    "Shift+Enter in a cell, again where JupyterLab was not ready to take it."
    cell = page.locator(".jp-CodeCell").nth(index)
    def started(): return cell.locator(".jp-InputPrompt").inner_text() != "[ ]:"
    for _ in range(20):
        cell.locator(".cm-content").click()
        page.keyboard.press("Shift+Enter")
        page.wait_for_timeout(500)
        if started(): return
    raise AssertionError(f"cell {index} does not run")


def picture(page, name):
    if SCREENSHOTS: page.screenshot(path=f"{SCREENSHOTS}/{name}.png")


def until(page, condition, seconds=20, what=""):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what or 'it'} did not happen in {seconds} s"
        page.wait_for_timeout(50)


def test_panel_and_playground_with_the_mouse(lab):
    sync = pytest.importorskip("playwright.sync_api")
    address, home = lab
    with sync.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM,
                                       args=["--no-sandbox", "--disable-gpu",
                                             "--disable-background-networking",
                                             "--disable-component-update", "--disable-sync"])
        page = browser.new_page(viewport={"width": 1360, "height": 1080})
        page.on("dialog", lambda dialog: dialog.accept())
        try:
            page.goto(address)
            page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]",
                                   timeout=60_000)
            page.wait_for_selector("text=Python 3 (ipykernel) | Idle", timeout=60_000)
            for cell in range(2): run_cell(page, cell)
            page.wait_for_selector('button.widget-button[title="Run"]', timeout=60_000)
            page.wait_for_selector('button.widget-button[title="Write"]', timeout=30_000)
            button = lambda title: page.locator(f'button.widget-button[title="{title}"]').first
            assert (state(page) == "ready"
                    and not page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count())
            button("Run").scroll_into_view_if_needed()
            page.wait_for_timeout(300)
            picture(page, "panel_before")

            command = page.locator(".sprout-command")   # follows a control
            page.locator(".jupyter-widgets select").first.select_option("mini")
            until(page, lambda: "--preset mini" in command.inner_text(),
                  what="the command's change")
            page.locator(".jupyter-widgets select").first.select_option("nano")
            button("Reset").click()
            until(page, lambda: "--hidden_size 32" in command.inner_text(),
                  what="the reset of the settings")

            button("Run").click()
            until(page, lambda: state(page) == "running", what="the run")
            until(page, lambda: page.locator("text=what it writes at step").count() > 0
                  and step(page) > 100, what="live progress")
            first_picture = page.locator(".widget-image").first.get_attribute("src")
            picture(page, "panel_during")
            until(page,
                  lambda: page.locator(".widget-image").first.get_attribute("src") != first_picture,
                  what="a new curve")

            asked = time.monotonic()
            button("Stop").click()
            until(page, lambda: state(page) == "stopped", what="the stop")
            took = time.monotonic() - asked
            print(f"stopped after {took:.2f} s")
            assert took < 2
            page.wait_for_timeout(200)
            stopped_at = step(page)
            picture(page, "panel_after")

            # the playground, on the model that the panel kept
            button("Write").scroll_into_view_if_needed()
            button("Write").click()
            until(page, lambda: state(page, 1) == "ready"
                  and page.locator(".sprout-text label").count() > 30, what="the text")
            letter = page.locator(".sprout-text label").nth(12)
            letter.click()
            page.wait_for_selector(".sprout-text label:nth-of-type(13) i", state="visible",
                                   timeout=5_000)
            assert letter.locator("s").count() == 5
            picture(page, "playground")

            page.keyboard.press("Control+s")
            button("Resume").click()
            until(page, lambda: state(page) == "running" and step(page) > stopped_at,
                  what="the resumed run")
            # widgets live in the kernel: the page finds them again, and the run goes on in it
            page.reload()
            page.wait_for_selector('button.widget-button[title="Stop"]', timeout=30_000)
            until(page, lambda: state(page) == "running", what="the reloaded panel")
            seen = step(page)
            until(page, lambda: step(page) > seen, what="progress after the reload")
            button("Stop").click()
            until(page, lambda: state(page) == "stopped", what="the second stop")
            assert (home / "work/run/checkpoints").is_dir()
        except BaseException:
            picture(page, "failure")
            raise
        finally: browser.close()
