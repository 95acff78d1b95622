"""The rooms with widgets in a real browser: JupyterLab on this machine, Chromium, clicks and keys.
"""
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
import yaml

root = Path(__file__).parent.parent
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None,
                                                     map(shutil.which,
                                                         ("chromium", "chromium-browser",
                                                          "google-chrome"))), None)
# a folder: keep pictures of what the browser showed
SCREENSHOTS = os.environ.get("SPROUT_LAB_SCREENSHOTS")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]

PANEL = """from sprout_lab.panels import compare, panel, playground
p = panel({family!r}, {settings}max_steps={max_steps}, sequence_length=64,
          batch_size=8, eval_interval=50, eval_batches=2,
          save_interval=1000, log_interval=10, tensorboard=False, sample_tokens=0, output_dir={name!r})
p"""
SMALL = "hidden_size=32, num_hidden_layers=1, num_attention_heads=2, "


def panel_cell(name: str, family: str = "transformer", settings: str = SMALL,
               max_steps: int = 5000) -> str:
    return PANEL.format(name=name, family=family, settings=settings, max_steps=max_steps)


class Lab:
    "JupyterLab with a home of its own."

    def __init__(self, home: Path):
        self.home, self.work = home, home / "work"
        self.work.mkdir()
        self.setting("apputils-extension/notification",
                     {"fetchNews": "false", "checkForUpdates": False})
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{s.getsockname()[1]}"
        env = {k: v for k, v in os.environ.items() if k != "CI" and not k.startswith("JUPYTER")}
        env |= {"HOME": str(home), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1",
                "JUPYTER_PLATFORM_DIRS": "0",
                "SPROUT_LAB_CACHE": os.environ["SPROUT_LAB_CACHE"],
                # or the first figure waits for a list of all fonts
                "MPLCONFIGDIR": matplotlib.get_cachedir()}
        options = ["--no-browser", "--allow-root", "--ip=127.0.0.1",
                   f"--port={self.url.rsplit(':', 1)[1]}", "--ServerApp.port_retries=0",
                   "--IdentityProvider.token=", "--ServerApp.password=",
                   "--KernelManager.shutdown_wait_time=5",
                   "--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={self.work}"]
        self.log = open(home / "server.log", "w")
        self.server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=env,
                                       stdout=self.log, stderr=subprocess.STDOUT,
                                       cwd=home)
        for _ in range(150):
            try: self.api("api"); break
            except OSError:
                assert self.server.poll() is None, (home / "server.log").read_text()
                time.sleep(0.2)

    def setting(self, name: str, values: dict) -> None:
        room, name = name.split("/")
        path = self.home / f".jupyter/lab/user-settings/@jupyterlab/{room}/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))

    def api(self, path: str, method: str = "GET"):
        request = urllib.request.Request(f"{self.url}/{path}", method=method,
                                         data=b"" if method == "POST" else None)
        return json.loads(urllib.request.urlopen(request, timeout=20).read() or b"null")

    def notebook(self, name: str, *cells: str) -> str:
        "Write a notebook and return its address."
        made = [{"cell_type": "code", "id": f"cell{i}", "metadata": {}, "source": source,
                 "outputs": [], "execution_count": None}
                for i, source in enumerate(cells)]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3",
                                 "language": "python"}}
        content = {"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
        (self.work / f"{name}.ipynb").write_text(json.dumps(content))
        return (f"{self.url}/doc/tree/{name}.ipynb" if name != "tree"
                else f"{self.url}/lab/tree/{name}.ipynb")

    def close(self) -> None:
        self.server.terminate()   # shuts its kernels down, too
        try: self.server.wait(10)
        except subprocess.TimeoutExpired: self.server.kill()
        self.log.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    if CHROMIUM is None: pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    pytest.importorskip("jupyterlab")
    lab = Lab(tmp_path_factory.mktemp("lab"))
    try: yield lab
    finally: lab.close()


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


class Page:
    "A notebook in a window, with what one does in it."

    def __init__(self, browser, lab: Lab, name: str, *cells: str, size=(1280, 800),
                 files: bool = False):
        self.lab, self.name = lab, name
        self.page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        self.page.set_default_timeout(10_000)
        self.page.on("dialog", lambda dialog: dialog.accept())
        address = lab.notebook(name, *cells)
        self.page.goto(address.replace("/doc/tree", "/lab/tree") + "?reset" if files else address)
        self.ready()
        if files and not self.page.locator(".jp-DirListing-item").first.is_visible():
            self.page.locator('.jp-SideBar [data-id="filebrowser"]').click()
            self.page.wait_for_selector(".jp-DirListing-item")

    def ready(self) -> None:
        self.page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]",
                                    timeout=60_000)
        self.page.wait_for_selector("text=/Python 3 .*Idle/", timeout=60_000)

    def run_cell(self, index: int) -> None:
        "Shift+Enter in a cell, again where JupyterLab was not ready to take it."
        cell = self.page.locator(".jp-CodeCell").nth(index)
        before = cell.locator(".jp-InputPrompt").inner_text()
        for _ in range(20):
            cell.locator(".cm-content").click()
            self.page.keyboard.press("Shift+Enter")
            self.page.wait_for_timeout(400)
            if cell.locator(".jp-InputPrompt").inner_text() != before: return
        raise AssertionError(f"cell {index} does not run")

    def restart_kernel(self) -> None:
        "As a person does it, with the button and a click into the question."
        self.page.locator('[data-jp-item-name="restart"]').first.click()
        self.page.locator(".jp-Dialog button.jp-mod-accept").click()
        self.page.wait_for_selector(".jp-Dialog", state="detached")
        # the number of a cell that ran before goes when the new kernel is there
        self.page.wait_for_timeout(500)
        self.ready()

    def open_panel(self, index: int = 0) -> None:
        self.run_cell(index)
        self.page.wait_for_selector('button.widget-button[title="Run"]', timeout=60_000)
        self.until(lambda: self.state() in ("ready", "running", "stopped", "finished"),
                   what="the panel")

    def button(self, title: str):
        return self.page.locator(f'button.widget-button[title="{title}"]').first

    def state(self, index: int = 0) -> str:
        return self.page.locator(".sprout-state").nth(index).inner_text()

    def message(self) -> str: return self.page.locator(".sprout-message").first.inner_text()

    def step(self) -> int:
        "The step that the panel's table shows."
        shown = self.page.locator(".sprout-progress")
        return int(re.search(r"step ([\d,]+) of",
                             shown.first.inner_text())[1].replace(",", "")) if shown.count() else -1

    def field(self, name: str):
        "The field of a setting, by its label."
        label = (f'//b[text()="{name}"]/ancestor::div[contains(concat(" ",@class," ")," '
                 f'widget-html ")]')
        return self.page.locator(f'xpath={label}/following-sibling::*[1]//input[@type="text"]').first

    def type(self, name: str, text: str) -> None:
        self.field(name).fill(text)
        self.field(name).press("Enter")

    def problem(self, words: str) -> bool:
        "Whether a mistake is answered with these words, beside its field."
        return self.page.locator(".widget-vbox .widget-vbox .sprout-problem",
                                 has_text=words).count() > 0

    def until(self, condition, seconds: float = 40, what: str = "it") -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what} did not happen in {seconds} s"
            self.page.wait_for_timeout(50)

    def until_state(self, *states: str, seconds: float = 50) -> None:
        self.until(lambda: self.state() in states, seconds, f"the state {' or '.join(states)}")

    def picture(self, name: str) -> None:
        if SCREENSHOTS: self.page.screenshot(path=f"{SCREENSHOTS}/{name}.png")

    def close(self) -> None:
        "Leave, and end the kernel: the next test has the machine for itself."
        self.picture(f"last_{self.name}")
        self.page.close()
        for session in self.lab.api("api/sessions"):
            self.lab.api(f"api/sessions/{session['id']}", "DELETE")


@pytest.fixture
def window(lab, browser):
    opened = []
    def open_page(name: str, *cells: str, **options) -> Page:
        opened.append(Page(browser, lab, name, *cells, **options))
        return opened[-1]
    yield open_page
    for page in opened: page.close()


def settings_of(lab: Lab, name: str) -> dict:
    "The settings that a run wrote down."
    content = yaml.safe_load((lab.work / name / "config.yaml").read_text())
    return {key: value for part in content.values() for key, value in part.items()}


def steps_of(lab: Lab, name: str) -> list[int]:
    return sorted(int(p.name.removeprefix("step_"))
                  for p in (lab.work / name / "checkpoints").glob("step_*"))


# ---- the panel, number by number -----------------------------------------------------------------

def test_1_what_is_typed_is_trained_and_mistakes_are_answered(lab, window):
    page = window("typed", panel_cell("typed", max_steps=12))
    page.open_panel()
    typed = {"hidden_size": "250", "sequence_length": "50", "batch_size": "7", "max_steps": "13"}
    page.type("num_attention_heads", "-3")
    page.until(lambda: page.problem("num_attention_heads=-3: a whole number at least 1"),
               what="an answer beside the field")
    assert page.field("num_attention_heads").input_value() == "-3"
    page.type("num_attention_heads", "5")
    for name, value in typed.items(): page.type(name, value)
    command = page.page.locator(".sprout-command")
    page.until(lambda: command.count() and all(f"--{n} {v}" in command.inner_text() for n,
                                               v in typed.items()), what="the command")
    assert {name: page.field(name).input_value() for name in typed} == typed
    page.type("learning_rate", "50")
    page.until(lambda: page.problem("learning_rate=50: a number above 0"),
               what="an answer beside the field")
    page.picture("1_typed")
    page.type("learning_rate", "0.0123")
    page.button("Run").click()
    page.until_state("finished")
    told = settings_of(lab, "typed")
    shown = {"hidden_size": 250, "sequence_length": 50, "batch_size": 7, "max_steps": 13,
             "num_attention_heads": 5, "learning_rate": 0.0123}
    assert {name: told[name] for name in shown} == shown


@pytest.mark.parametrize("size", [(1280, 800), (1920, 1080)])
def test_2_everything_is_in_view(window, size):
    page = window(f"fits{size[0]}", panel_cell(f"fits{size[0]}", settings="", max_steps=60),
                  size=size, files=True)
    page.open_panel()
    page.button("Run").click()
    page.until(lambda: page.page.locator(".jp-OutputArea svg .sprout-hover").count() > 0,
               what="a curve")
    page.button("Run").scroll_into_view_if_needed()
    def inside(locator) -> bool:
        box = locator.bounding_box()
        return (box is not None and box["y"] >= 0 and box["y"] + box["height"] <= size[1]
                and box["x"] + box["width"] <= size[0])
    curve, head, form = (page.page.locator(".jp-OutputArea svg").first,
                         page.page.locator(".sprout-state").first, page.field("batch_size"))
    page.picture(f"2_running_{size[0]}")
    assert inside(curve), (curve.bounding_box(), size)
    # two columns
    assert (curve.bounding_box()["x"] > form.bounding_box()["x"] and inside(head)
            and inside(page.button("Stop")))
    for group in ("Model", "Training"):
        page.page.locator("[class*=Collapse-header]", has_text=group).first.click()
    page.page.wait_for_timeout(500)
    page.picture(f"2_unfolded_{size[0]}")
    assert inside(head) and inside(page.button("Stop")) and inside(curve)


def test_3_a_cell_that_is_run_twice_finds_its_run(lab, window):
    page = window("twice", panel_cell("twice"))
    page.open_panel()
    page.button("Run").click()
    page.until(lambda: page.step() > 20, what="progress")
    before = page.step()
    page.run_cell(0)
    page.until(lambda: "this cell's run goes on" in page.message(), what="the adoption")
    page.until(lambda: page.state() == "running" and page.step() > before,
               what="progress of the same run")
    page.picture("3_adopted")
    cell = page.page.locator(".jp-CodeCell").first.locator(".cm-content")
    cell.click()
    page.page.keyboard.press("Control+End")
    # another cell now: the same panel, other arguments
    page.page.keyboard.type("\n\n")
    page.page.keyboard.press("Control+a")
    page.page.keyboard.insert_text(panel_cell("other", max_steps=77))
    page.page.keyboard.press("Shift+Enter")
    words = "the run that this cell began before was stopped, in twice"
    page.until(lambda: words in page.message(), what="the word of the stop")
    assert page.state() == "ready" and page.field("max_steps").input_value() == "77"
    page.until(lambda: max(steps_of(lab, "twice")) > before, what="the stopped run's checkpoint")


def test_4_after_a_restart_the_panel_offers_to_continue(lab, window):
    page = window("again", panel_cell("again"))
    page.open_panel()
    page.button("Run").click()
    page.until(lambda: page.step() > 30, what="progress")
    seen = page.step()
    page.restart_kernel()
    last = max(steps_of(lab, "again"))
    assert last >= seen, "the kernel's end wrote no checkpoint"
    page.run_cell(0)
    offer = page.page.locator("select",
                              has=page.page.locator("option", has_text=f"continue again, step "
                                                                       f"{last:,} of 5,000"))
    page.until(lambda: offer.count() > 0 and offer.first.is_visible(), 30, "the offer")
    page.picture("4_offer")
    page.button("Continue").click()
    page.until(lambda: page.state() == "running" and page.step() > last, 30, "the run that goes on")
    assert "in again" in page.message() or "/again" in page.message()
    page.button("Stop").click()
    page.until_state("stopped")
    page.button("Reset").click()
    page.until_state("ready")
    page.until(lambda: page.button("Continue").is_visible(), what="the offer after a reset")


def test_5_run_after_run(lab, window):
    page = window("runs", panel_cell("first", max_steps=40))
    page.open_panel()
    page.button("Measure").click()
    page.until(lambda: "(measured in 5 steps just now)" in page.message(), 50, "the measurement")
    page.button("Run").click()
    page.until_state("finished")
    page.type("learning_rate", "0.004")
    page.button("Run").click()
    page.until(lambda: page.state() == "finished" and "first-2" in page.message(), 50,
               "the second run")
    words = page.page.locator(".sprout-hover").last
    page.until(lambda: "learning_rate=0.01 " in words.text_content(),
               what="the first run's pale line")
    picture = page.page.locator(".jp-OutputArea svg").first
    strip = page.page.locator(".sprout-hover").nth(3)
    strip.locator("rect").hover(force=True)
    page.until(lambda: strip.locator("g text").first.is_visible(), what="values under the mouse")
    assert re.match(r"step \d+", strip.locator("g text").first.text_content())
    page.picture("5_hover")
    before = picture.inner_html()
    page.page.locator("select",
                      has=page.page.locator("option",
                                            has_text="gradient norm")).first.select_option("gradient norm")
    page.until(lambda: picture.inner_html() != before, what="the gradient norms")
    page.page.locator(".jp-OutputArea [role=tab]", has_text="Runs").click()
    page.page.locator('input[placeholder="name"]').fill("small one")
    page.page.locator('input[placeholder="name"]').press("Enter")
    page.button("Rename").click()
    page.until(lambda: (lab.work / "small one/config.yaml").exists(), what="the new name")
    page.picture("5_runs")
    for _ in range(2):
        page.page.locator("button.widget-button",
                          has_text=re.compile("Delete|Really delete")).first.click()
    page.until(lambda: not (lab.work / "small one").exists(), what="the deletion")


def test_6_the_right_sliders_on_top_and_no_empty_choice(window):
    page = window("tree_settings", panel_cell("tree_settings", family="sprout", settings=""))
    page.open_panel()
    labels = page.page.locator(".jp-OutputArea .widget-gridbox b")
    shown = labels.all_inner_texts()
    assert shown[:2] == ["preset", "objective"] and {"max_nodes", "compatibility_threshold",
                                                     "growth"} <= set(shown)
    for group in ("Model", "Data", "Training"):
        page.page.locator("[class*=Collapse-header]", has_text=group).first.click()
        labels = page.page.locator(".widget-accordion .widget-gridbox b:visible")
        page.until(lambda: labels.count() > 5, what=f"the group {group}")
        for menu in page.page.locator(".jp-OutputArea select:visible").all():
            assert menu.evaluate("menu => menu.selectedIndex >= 0 && "
                                 "menu.selectedOptions[0].text.trim() !== ''")
    page.picture("6_sprout")


def test_7_units_gaps_and_times(window):
    page = window("tree_run",
                  panel_cell("tree_run", family="sprout", settings="hidden_size=32, max_nodes=3, "))
    page.open_panel()
    page.button("Run").click()
    page.until(lambda: page.page.locator(".jp-OutputArea svg").count() > 0 and page.step() < 10
               or page.step() > 60, what="a first curve")
    assert page.step() < 10, "the first curve came after the first row of the log"
    page.until(lambda: page.step() > 20, what="progress")
    text = page.page.locator(".jp-OutputArea").first.inner_text()
    assert ("what it fills in at step 0" in text and "nats per" in text
            and "bits per byte" not in text)
    assert len(set(re.findall(r"nats per [a-z ]*token", text))) == 1
    page.button("Stop").click()
    page.until_state("stopped")
    page.button("Resume").click()
    page.until(lambda: "left" in page.page.locator(".sprout-progress").first.inner_text(),
               what="the time that is left")
    told = page.page.locator(".sprout-progress").first.inner_text()
    step, total = (int(n.replace(",", ""))
                   for n in re.search(r"step ([\d,]+) of ([\d,]+)", told).groups())
    minutes, seconds = re.search(r"about (?:(\d+) min )?0?(\d+) s left", told).groups()
    left = 60 * int(minutes or 0) + int(seconds)
    # seconds a step; the wait for the resumed state is not among them
    assert 0 < left / (total - step) < 1, told
    curve, column = (page.page.locator(".jp-OutputArea svg").first.bounding_box(),
                     page.page.locator(".widget-tab-contents").first.bounding_box())
    assert curve["width"] > 0.9 * min(column["width"] - 40, 700), (curve, column)
    page.picture("7_sprout")
    page.button("Stop").click()
    page.until_state("stopped")


LIVE = """from sprout_lab.families import configure, make_trainer
from sprout_lab.panels import compare
from sprout_lab.panels.live import Live
run = configure("transformer", dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                    sequence_length=32, batch_size=4, max_steps=40,
                eval_interval=10, eval_batches=1, sample_tokens=0, tensorboard=False, output_dir="runs/live"))
make_trainer(run, extra_callbacks=[Live()]).train();"""
LIGHT_INK = """node => {
    const [r, g, b] = getComputedStyle(node).color.match(/[\\d.]+/g).map(Number)
    const page = getComputedStyle(document.body).getPropertyValue('--jp-layout-color0')
    return [0.2126 * r + 0.7152 * g + 0.0722 * b, page.trim()]
}"""


def test_8_pictures_follow_a_dark_page(lab, window):
    lab.setting("apputils-extension/themes", {"theme": "JupyterLab Dark"})
    try:
        page = window("dark", LIVE, "compare()",
                      panel_cell("runs/live-2", max_steps=40) + ".attach('runs/live')\np")
        page.run_cell(0)
        page.page.wait_for_selector(".sprout-live", timeout=60_000)
        image = page.page.locator(".jp-RenderedImage img").first
        page.until(lambda: image.is_visible(), 30, "the live picture")
        assert "invert" in image.evaluate("image => getComputedStyle(image).filter")
        page.until(lambda: "finished" in page.page.locator(".sprout-live").first.inner_text(), 30,
                   "the end of the run")
        page.run_cell(1)
        page.page.wait_for_selector(".jp-OutputArea svg", timeout=60_000)
        page.run_cell(2)
        page.page.wait_for_selector('button.widget-button[title="Run"]', timeout=60_000)
        for number in range(page.page.locator(".jp-OutputArea .widget-html svg").count()):
            ink, paper = page.page.locator(".jp-OutputArea .widget-html svg").nth(number).evaluate(LIGHT_INK)
            assert ink > 150 and paper in ("#111", "#111111", "#000"), (ink, paper)
        page.picture("8_dark_compare")
        page.button("Run").scroll_into_view_if_needed()
        page.page.wait_for_timeout(300)
        page.picture("8_dark_panel")
    finally: lab.setting("apputils-extension/themes", {"theme": "JupyterLab Light"})


def test_stop_answers_and_a_reloaded_page_finds_its_run(lab, window):
    page = window("reload", panel_cell("reload"),
                  'play = playground(p, prompt="ROMEO:", max_tokens=60, seed=1)\nplay')
    page.open_panel()
    page.run_cell(1)
    page.page.wait_for_selector('button.widget-button[title="Write"]', timeout=60_000)
    page.button("Run").scroll_into_view_if_needed()
    page.button("Run").click()
    page.until(lambda: page.step() > 60, what="progress")
    first = page.page.locator(".jp-OutputArea svg").first.inner_html()
    page.until(lambda: page.page.locator(".jp-OutputArea svg").first.inner_html() != first,
               what="a new curve")
    asked = time.monotonic()
    page.button("Stop").click()
    page.until_state("stopped")
    assert time.monotonic() - asked < 3
    # the playground, on the model that the panel kept
    page.button("Write").scroll_into_view_if_needed()
    page.button("Write").click()
    page.until(lambda: page.page.locator(".sprout-text label").count() > 30, what="the text")
    letter = page.page.locator(".sprout-text label").nth(12)
    letter.click()
    page.page.wait_for_selector(".sprout-text label:nth-of-type(13) i", state="visible",
                                timeout=5_000)
    assert letter.locator("s").count() == 5
    page.picture("playground")
    page.page.keyboard.press("Control+s")
    stopped_at = page.step()
    page.button("Resume").click()
    page.until(lambda: page.state() == "running" and page.step() > stopped_at,
               what="the resumed run")
    # widgets live in the kernel: the page finds them again
    page.page.reload()
    page.page.wait_for_selector('button.widget-button[title="Stop"]', timeout=60_000)
    page.until(lambda: page.state() == "running", what="the reloaded panel")
    seen = page.step()
    page.until(lambda: page.step() > seen, what="progress after the reload")
    page.button("Stop").click()
    page.until_state("stopped")


ROOMS = """from sprout_lab.families import configure, make_trainer
from sprout_lab.panels import ask, compare, playground, replay
small = dict(hidden_size=32, sequence_length=32, batch_size=4, warmup_steps=2, eval_interval=10,
             eval_batches=1, final_eval_batches=1, log_interval=5, sample_tokens=0,
             tensorboard=False, device="cpu")
for name, family, own in [("slow", "transformer", dict(learning_rate=0.001)),
                          ("fast", "transformer", dict(learning_rate=0.01)),
                          ("tree", "sprout", dict(growth_warmup=5, growth_interval=5, max_nodes=3))]:
    run = configure(family, {**small, **own, "max_steps": 20, "output_dir": f"rooms/{name}"})
    make_trainer(run, log=lambda words: None).train()
print("trained")"""


@pytest.mark.slow   # trains three runs and walks through four rooms: a minute for each width
@pytest.mark.parametrize("size", [(1280, 800), (1920, 1080)])
def test_the_other_rooms(window, size):
    page = window(f"rooms{size[0]}", ROOMS, "c = compare('rooms')\nc",
                  "c.choose(['slow', 'fast', 'tree'])", "playground('rooms/tree')",
                  "ask('rooms/tree')", "replay('rooms/tree')", size=size, files=True)
    page.run_cell(0)
    page.page.wait_for_selector("text=/^trained/", timeout=240_000)
    cells = page.page.locator(".jp-CodeCell")
    # compare: something is chosen at the start, runs are told apart, units have rows of their own
    page.run_cell(1)
    menu = cells.nth(1).locator("select")
    texts = "menu => [...menu.{}].map(option => option.text.replaceAll('\xa0', ' '))"
    page.until(lambda: menu.count() and menu.evaluate(texts.format("selectedOptions")),
               what="a choice")
    chosen = menu.evaluate(texts.format("selectedOptions"))
    assert len({"hidden token" in name for name in chosen}) == 1, "runs of one unit"
    assert any("nats per hidden token" in name for name in menu.evaluate(texts.format("options")))
    page.run_cell(2)
    curves = cells.nth(1).locator(".jp-OutputArea svg[viewBox]")
    page.until(lambda: curves.count() == 4, what="two pictures for each of two units")
    boxes = [curve.bounding_box() for curve in curves.all()]
    assert max(b["width"] for b in boxes) - min(b["width"] for b in boxes) < 3, boxes
    assert boxes[0]["y"] == boxes[1]["y"] < boxes[2]["y"] == boxes[3]["y"]
    said = cells.nth(1).locator(".jp-OutputArea").first.inner_text()
    assert "best bits per byte" in said and "best nats per hidden token" in said
    drawn = " ".join(curve.evaluate("node => node.outerHTML") for curve in curves.all())
    assert "learning_rate=0.001" in drawn and "learning_rate=0.01" in drawn
    rows = [row.split("\t")[1:] for row in cells.nth(1).locator("table tr").all_inner_texts()]
    assert len(rows) > 4 and all(set(map(str.strip, row)) - {"", "-", "–", "—"} for row in rows)
    # a masked model's playground: gaps filled, surprise shaded, in its own unit
    page.run_cell(3)
    page.page.wait_for_selector('button.widget-button[title="Fill"]', timeout=60_000)
    page.button("Fill").click()
    guesses = cells.nth(3).locator(".guess")
    page.until(lambda: guesses.count() >= 1, what="a filled gap")
    words = cells.nth(3).locator(".jp-OutputArea").first.inner_text()
    assert "pseudo bits per byte" in words and "8 bits of surprise" in words
    # ask: both pictures beside each other, inside the window
    page.run_cell(4)
    shown = cells.nth(4).locator(".jp-OutputArea svg[viewBox]")
    page.until(lambda: shown.count() == 2, what="a tree and an attention")
    way, looked = (picture.bounding_box() for picture in shown.all())
    cells.nth(4).locator("input[type=text]").scroll_into_view_if_needed()
    page.picture(f"ask_{size[0]}")
    assert way["x"] + way["width"] <= looked["x"] and looked["x"] + looked["width"] <= size[0]
    # replay begins with the last moment
    page.run_cell(5)
    slider = cells.nth(5).locator("input[type=range]")
    page.until(lambda: slider.count() == 1, what="the replay")
    assert slider.evaluate("node => node.value === node.max && Number(node.max) > 0")
    page.picture(f"rooms_{size[0]}")
