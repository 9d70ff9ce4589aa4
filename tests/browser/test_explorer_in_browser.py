"""Lesson 06 in a real JupyterLab, in a real Chromium: ask, stop, compare, branch, export, replay."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
import yaml

from llamalab.catalog.models_dir import project_directory

pytestmark = pytest.mark.slow

ROOT = project_directory()
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LESSON = "06_explore_prompts.ipynb"
MINUTE = 60_000
SCRIPT = "<img src=x onerror=\"document.title='injected'\"><script>document.title='x'</script>"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        message = "no browser: sudo apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        # Chromium's own sandbox needs rights that containers do not give to root.
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


class Server:
    """A Jupyter server on loopback with a token, on copies of the lesson and an empty history."""

    def __init__(self, home: Path, models: Path, *command: str):
        (home / "notebooks").mkdir(parents=True, exist_ok=True)
        book = nbformat.read(ROOT / "notebooks" / LESSON, as_version=4)
        for cell in book.cells:
            cell.source = cell.source.replace(
                "AnswerHistory()", f"AnswerHistory({str(home / 'h.json')!r})"
            )
        nbformat.write(book, home / "notebooks" / LESSON)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.home, self.token = home, secrets.token_hex(16)
        options = [f"--ServerApp.{name}" for name in (
            "ip=127.0.0.1", f"port={self.port}", "open_browser=False", "allow_root=True",
            f"root_dir={home}",
        )]  # fmt: skip
        environment = os.environ | {
            "LLAMALAB_MODELS_DIR": str(models),
            "JUPYTER_TOKEN": self.token,
            "JUPYTER_CONFIG_DIR": str(home / "config"),
            "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
            "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        }
        self.log = (home / "log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jupyter", *command, *options],
            env=environment, cwd=home, stdout=self.log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError((home / "log").read_text())

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}?token={self.token}"

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


@pytest.fixture
def serve(lab, tmp_path):
    servers = []

    def start(*command: str) -> Server:
        servers.append(Server(tmp_path / "home", lab, *command))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def pictures() -> Path:
    folder = ROOT / "runs" / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def control(page, label: str):
    labelled = f".llamalab-explorer .widget-inline-hbox:has(> label:text-is('{label}')):visible"
    return page.locator(labelled).first


def choose(page, label: str, option: str) -> None:
    control(page, label).locator("select").select_option(label=option)


def press(page, name: str) -> None:
    page.locator(".llamalab-explorer button:visible", has_text=re.compile(f"^ *{name}$")).click()


def facts(page, number=0):
    return page.locator(".llamalab-column").nth(number).locator(".widget-html").last


def answered(page, number=0) -> str:
    facts(page, number).get_by_text("tokens/s").wait_for(timeout=MINUTE)
    return page.locator(".llamalab-column").nth(number).locator("pre").first.inner_text()


def ask(page, prompt: str) -> None:
    area = page.locator(".llamalab-explorer textarea:visible").first
    area.fill(prompt)
    area.press("Control+Enter")


def number(page, label: str, value: str) -> None:
    readout = control(page, label).locator(".widget-readout")
    readout.fill(value)
    readout.press("Enter")


def test_the_explorer_in_jupyterlab(browser, serve, pictures, lab, tmp_path):
    server = serve("lab", "--LabApp.expose_app_in_browser=True")
    page = browser.new_page(viewport={"width": 1500, "height": 1300})
    elsewhere, wrong = [], []
    page.on("request", lambda r: None if "127.0.0.1" in r.url or r.url.startswith(("data:", "blob:"))
            else elsewhere.append(r.url))  # fmt: skip
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(server.url(f"lab/tree/notebooks/{LESSON}"))
    page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for(timeout=MINUTE)
    page.wait_for_function(
        "document.querySelector('.jp-NotebookPanel')"
        " && window.jupyterapp && window.jupyterapp.shell.currentWidget?.sessionContext"
        "?.session?.kernel?.status === 'idle'", timeout=MINUTE,
    )  # fmt: skip
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    tool = page.locator(".llamalab-explorer")
    tool.wait_for(timeout=2 * MINUTE)
    if page.get_by_role("button", name="No", exact=True).is_visible():
        page.get_by_role("button", name="No", exact=True).click()  # no news from the network
    page.get_by_text("[OK]   the tool shows no error").wait_for(timeout=2 * MINUTE)
    tool.scroll_into_view_if_needed()

    # The first answer, by a click; its time is printed, for a person to read.
    began = time.perf_counter()
    press(page, "Generate")
    page.locator(".llamalab-column pre").first.wait_for(timeout=MINUTE)
    print(f"first text after {time.perf_counter() - began:.2f} s", end=", ")
    assert answered(page)
    print(f"the whole after {time.perf_counter() - began:.2f} s")

    # A branch, before anything else changes.
    page.locator(".llamalab-answer[role=button]").nth(1).click()
    choice = page.locator(".llamalab-choice").nth(1)
    wanted = choice.inner_text().rsplit(" ", 2)[0]
    page.screenshot(path=pictures / "light.png")
    choice.click()
    page.wait_for_function(
        "t => document.querySelectorAll('.llamalab-answer[role=button]')[1]?.textContent === t",
        arg=wanted, timeout=MINUTE,
    )  # fmt: skip
    answered(page)

    # Text streams in, and Esc ends it.
    choose(page, "Template", "none")
    choose(page, "Model", "llama-lab")
    number(page, "Max new tokens", "240")
    number(page, "Temperature", "1.5")
    ask(page, "The")
    length = "document.querySelector('.llamalab-column pre')?.textContent.length"
    seen = page.wait_for_function(f"{length} > 2 && {length}", timeout=MINUTE).json_value()
    grown = page.wait_for_function(f"n => {length} > n && {length}", arg=seen, timeout=MINUTE)
    page.keyboard.press("Escape")  # before a fast machine has said it all
    part = answered(page)
    assert "stopped" in facts(page).inner_text() and seen < grown.json_value() <= len(part) + 3

    # Export what was stopped; answering the export again gives the same.
    page.get_by_role("tab", name="History").click()
    page.locator(".llamalab-explorer select[multiple] option").first.click()
    choose(page, "Export as", "yaml")
    press(page, "Export")
    path = page.locator(".llamalab-explorer b:visible", has_text=".yaml")
    path.wait_for(timeout=MINUTE)
    exported = Path(path.inner_text())
    newest = json.loads((server.home / "h.json").read_text())[-1]
    assert newest["stopped"] and newest["text"].strip() == part.strip()

    # Two models, and what differs; nothing that is said becomes HTML.
    page.get_by_role("tab", name="Ask").click()
    number(page, "Max new tokens", "30")
    choose(page, "Model", "chinese-alpaca-lab")
    choose(page, "Compare", "base against merged")
    page.locator(".llamalab-column").nth(1).wait_for()
    ask(page, "月亮是什么？")
    page.locator(".llamalab-explorer mark").first.wait_for(timeout=MINUTE)
    assert answered(page, 0) != answered(page, 1)
    page.screenshot(path=pictures / "compare-light.png")
    page.evaluate(
        "window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})"
    )
    page.wait_for_function("document.body.dataset.jpThemeLight === 'false'", timeout=MINUTE)
    page.wait_for_timeout(500)
    page.screenshot(path=pictures / "compare-dark.png")
    ask(page, SCRIPT)
    answered(page, 1)
    assert "inject" not in page.title() and page.locator(".llamalab-explorer img").count() == 0
    page.locator(".llamalab-explorer .jupyter-widget-Collapse-header").first.click()
    page.wait_for_timeout(500)
    page.screenshot(path=pictures / "dark.png")

    # An error is red, and a conversation has two turns.
    ask(page, "长" * 3000)
    page.locator(".llamalab-error", has_text="the context holds").wait_for(timeout=MINUTE)
    page.screenshot(path=pictures / "error-dark.png")
    page.get_by_role("tab", name="Chat").click()
    for count, text in enumerate(("苹果是植物吗", "它是什么？"), 1):
        ask(page, text)
        page.wait_for_function(
            "n => document.querySelectorAll('.llamalab-explorer pre').length >= 2 * n", arg=count
        )
        page.wait_for_timeout(1500)
    page.screenshot(path=pictures / "chat-dark.png")
    assert elsewhere == [] and wrong == []

    replay(exported, newest, lab, tmp_path)


def replay(exported: Path, newest: dict, lab: Path, tmp_path: Path) -> None:
    """Run the export through papermill and `llamalab run -f`: the same tokens each time."""
    assert yaml.safe_load(exported.read_text("utf-8"))["max_new_tokens"] == len(newest["ids"])
    environment = os.environ | {"LLAMALAB_MODELS_DIR": str(lab)}
    lesson, out = ROOT / "notebooks" / LESSON, tmp_path / "out.ipynb"
    commands = [
        ["papermill", "-f", exported, lesson, out],
        ["llamalab", "run", "06", "-f", exported, "--output-dir", tmp_path / "runs"],
    ]
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", *map(str, command)],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    for path in (out, next((tmp_path / "runs").glob(f"*/{LESSON}"))):
        outputs = [o for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", [])]
        mime = "application/vnd.llamalab.results+json"
        found = next(o.data[mime] for o in outputs if mime in o.get("data", {}))
        assert (found["text"], found["ids"]) == (newest["text"], newest["ids"])


def test_the_lesson_as_a_page(browser, serve, pictures):
    policy = re.search(r"^POLICY = (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)[1]
    headers = {"headers": {"Content-Security-Policy": policy}}
    server = serve("server", f"--ServerApp.tornado_settings={headers}")
    page = browser.new_page(viewport={"width": 1300, "height": 1300})
    elsewhere = []
    page.on("response", lambda r: elsewhere.append(r.url) if "//cdn" in r.url else None)
    bare = server.url(f"voila/render/notebooks/{LESSON}").split("?")[0]
    assert "login" in page.goto(bare).url  # not without the token
    page.goto(server.url(f"voila/render/notebooks/{LESSON}"), timeout=3 * MINUTE)
    page.locator(".llamalab-explorer").wait_for(timeout=3 * MINUTE)
    press(page, "Generate")
    assert answered(page)
    assert page.get_by_text("Explorer(models_dir").count() == 0  # no code
    assert elsewhere == []
    page.screenshot(path=pictures / "page.png")
