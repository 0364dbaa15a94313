"""`moco label` in a real browser, with a keyboard."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from label_helpers import CLASSES, command, labels, served, write_form, write_own_form

from conftest import Moco
from moco.labels.reply import Reply
from moco.labels.server import address


@pytest.fixture
def form(tmp_path: Path) -> Path:
    return write_form(tmp_path)


KEYS = {"right": "\ue014", "left": "\ue012", "delete": "\ue017", "enter": "\ue007"}


class Browser:
    """Chromium, by the WebDriver protocol (https://www.w3.org/TR/webdriver2/)."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.root = f"http://127.0.0.1:{free.getsockname()[1]}"
        port = self.root.rpartition(":")[2]
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
        arguments = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder}",
        ]  # fmt: skip
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": {"args": arguments}}}}
        for attempt in range(50):
            try:
                self.session = self.call("POST", "/session", wanted)["sessionId"]
                break
            except urllib.error.URLError:
                assert attempt < 49
                time.sleep(0.2)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as found:
            return json.loads(found.read())["value"]

    def open(self, url: str) -> None:
        self.call("POST", f"/session/{self.session}/url", {"url": url})

    def run(self, script: str) -> Any:
        return self.call("POST", f"/session/{self.session}/execute/sync", {"script": script, "args": []})

    def press(self, *keys: str) -> None:
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        device = {"type": "key", "id": "keyboard", "actions": actions}
        self.call("POST", f"/session/{self.session}/actions", {"actions": [device]})

    def wait(self, script: str) -> None:
        for _ in range(100):
            if self.run(f"return {script}"):
                return
            time.sleep(0.05)
        raise AssertionError(script + "\n" + str(self.run("return document.body.innerText")))

    def new_tab(self) -> str:
        """Opens a tab and goes to it. Returns the one of before."""
        before: str = self.call("GET", f"/session/{self.session}/window")
        tab = self.call("POST", f"/session/{self.session}/window/new", {"type": "tab"})
        self.go_to(tab["handle"])
        return before

    def go_to(self, tab: str) -> None:
        self.call("POST", f"/session/{self.session}/window", {"handle": tab})

    def close(self) -> None:
        with contextlib.suppress(urllib.error.URLError):
            self.call("DELETE", f"/session/{self.session}")
        self.driver.terminate()
        self.driver.wait()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if not shutil.which("chromedriver"):
        assert not os.environ.get("MOCO_NO_SKIP"), "no chromedriver"
        pytest.skip("needs chromedriver and chromium")
    found = Browser(tmp_path / "profile")
    try:
        yield found
    finally:
        found.close()


@pytest.mark.slow
def test_in_a_browser_a_key_answers(form: Path, tmp_path: Path, browser: Browser) -> None:
    path = tmp_path / "reply.csv"
    with served(Reply(form, path, CLASSES)) as server:
        browser.open(address(server))
        browser.wait("document.getElementById('count').textContent === '0 of 6 answered'")
        browser.wait("document.getElementById('image').naturalWidth === 32")
        browser.press("2")
        browser.wait("document.getElementById('name').textContent === '2.png'")
        assert labels(path)["0.png"] == "dog"
        browser.press(KEYS["right"])
        browser.wait("document.getElementById('image').complete")
        browser.press("7", "3")  # 7 is no class
        browser.wait("document.getElementById('count').textContent === '2 of 6 answered'")
        assert labels(path)["4.png"] == "owl"
        browser.press(KEYS["left"])
        browser.press(KEYS["delete"])
        browser.wait("document.getElementById('count').textContent === '1 of 6 answered'")
        assert labels(path)["4.png"] == ""
        for number in range(5):
            browser.wait("document.getElementById('image').complete")
            browser.press("1")
            browser.wait(f"document.getElementById('count').textContent === '{number + 2} of 6 answered'")
        browser.wait("document.getElementById('said').textContent.startsWith('all answered')")
        assert set(labels(path).values()) == {"dog", "cat"}
        browser.open(f"http://127.0.0.1:{server.server_port}/?token=wrong")
        browser.wait("document.body.innerText.includes('wrong token')")


@pytest.mark.slow
def test_in_a_browser_nobody_answers_for_a_picture_that_is_not_there(
    form: Path, tmp_path: Path, browser: Browser
) -> None:
    path, there = tmp_path / "reply.csv", Event()

    def picture(place: int) -> np.ndarray:
        assert place == 0 or there.wait(60)
        return np.zeros((32, 32, 3), np.uint8)

    with served(Reply(form, path, CLASSES), picture) as server:
        browser.open(address(server))
        browser.wait("document.getElementById('image').naturalWidth === 32")
        browser.press("2")
        browser.wait("document.getElementById('name').textContent === '2.png'")
        browser.press("3")
        time.sleep(0.5)
        assert labels(path)["2.png"] == ""
        there.set()
        browser.wait("document.getElementById('image').complete")
        browser.press("3")
        browser.wait("document.getElementById('count').textContent === '2 of 6 answered'")
        assert labels(path)["2.png"] == "owl"


@pytest.mark.slow
def test_in_a_browser_many_classes_are_typed(form: Path, tmp_path: Path, browser: Browser) -> None:
    path = tmp_path / "reply.csv"
    names = [f"bird {n}" for n in range(20)] + ["<b>snow & owl</b>", "fox"]
    with served(Reply(form, path, names)) as server:
        browser.open(address(server))
        browser.wait("document.querySelectorAll('#classes li').length === 22")
        browser.wait("document.getElementById('image').complete")
        browser.press(*"OWL")
        browser.wait("document.querySelectorAll('#classes li').length === 1")
        browser.press(KEYS["enter"])
        browser.wait("document.getElementById('count').textContent === '1 of 6 answered'")
        assert labels(path)["0.png"] == "<b>snow & owl</b>"
        browser.wait("document.querySelectorAll('#classes li').length === 22")
        browser.wait("document.getElementById('image').complete")
        server.shutdown()
        server.server_close()
        browser.press(*"fox", KEYS["enter"])
        browser.wait("document.getElementById('problem').textContent.startsWith('not saved')")
        assert labels(path)["2.png"] == ""


@pytest.mark.slow
@pytest.mark.fault("two-pages")
def test_two_tabs_do_not_overwrite_each_other(form: Path, tmp_path: Path, browser: Browser) -> None:
    path = tmp_path / "reply.csv"
    with served(Reply(form, path, CLASSES)) as server:
        browser.open(address(server))
        browser.wait("document.getElementById('image').naturalWidth === 32")
        first = browser.new_tab()
        browser.open(address(server))
        browser.wait("document.getElementById('image').naturalWidth === 32")
        second = browser.call("GET", f"/session/{browser.session}/window")
        browser.go_to(first)
        browser.press("2")
        browser.wait("document.getElementById('name').textContent === '2.png'")
        browser.go_to(second)
        assert browser.run("return document.getElementById('name').textContent") == "0.png"
        browser.press("1")
        browser.wait("document.getElementById('problem').textContent.includes(\"was answered 'dog'\")")
        assert browser.run("return document.querySelector('button.chosen').textContent") == "2 dog"
        assert labels(path)["0.png"] == "dog"
        browser.press("1")  # on purpose now
        browser.wait("document.getElementById('name').textContent === '2.png'")
        assert labels(path)["0.png"] == "cat" and browser.run("return state.labels[0]") == "cat"
        browser.wait("document.getElementById('image').complete")
        browser.press("3")
        browser.wait("document.getElementById('name').textContent === '4.png'")
        browser.go_to(first)
        browser.wait("document.getElementById('count').textContent === '2 of 6 answered'")  # by itself
        browser.press("3")  # what the other said
        browser.wait("document.getElementById('name').textContent === '4.png'")
        assert labels(path) == {
            "0.png": "cat",
            "2.png": "owl",
            **dict.fromkeys(["1.png", "3.png", "4.png", "5.png"], ""),
        }
        assert not browser.run("return document.getElementById('problem').textContent")


@pytest.mark.slow
@pytest.mark.fault("two-pages")
def test_a_page_whose_server_was_killed_says_so(moco: Moco, project: Path, browser: Browser) -> None:
    assert moco("data").returncode == 0
    write_own_form(6)
    path, gone = project / "labels/reply.csv", "document.getElementById('gone').textContent"
    with command(project) as (running, url):
        browser.open(url)
        browser.wait("document.getElementById('image').naturalWidth === 32")
        browser.press("2")
        browser.wait("document.getElementById('count').textContent === '1 of 6 answered'")
        assert not browser.run(f"return {gone}")
        running.kill()
        running.wait()
        browser.wait(f"{gone}.includes('nothing that is answered now is saved')")  # before anybody answers
        browser.press("3")
        browser.wait("document.getElementById('problem').textContent.startsWith('not saved')")
        assert browser.run("return document.getElementById('count').textContent") == "1 of 6 answered"
    assert labels(path)["0.png"] == "1"
    with command(project) as (_, url):  # no lock stays
        browser.open(url)
        browser.wait("document.getElementById('count').textContent === '1 of 6 answered'")
        browser.wait("document.getElementById('name').textContent === '1.png'")
        browser.wait("document.getElementById('image').naturalWidth === 32")
        browser.press("3")
        browser.wait("document.getElementById('count').textContent === '2 of 6 answered'")
    assert [labels(path)[name] for name in ("0.png", "1.png", "2.png")] == ["1", "2", ""]


@pytest.mark.slow
def test_nobody_answers_for_a_picture_that_could_not_be_sent(form: Path, tmp_path: Path, browser: Browser) -> None:
    def picture(place: int) -> np.ndarray:
        if place == 1:
            raise ConnectionError("lost")
        return np.zeros((32, 32, 3), np.uint8)

    with served(Reply(form, tmp_path / "reply.csv", CLASSES), picture) as server:
        browser.open(address(server))
        browser.wait("document.getElementById('image').naturalWidth === 32")
        browser.press("2")
        browser.wait("document.getElementById('name').textContent === '2.png'")
        browser.wait("document.getElementById('image').complete")
        browser.press("3")
        time.sleep(0.5)
        assert labels(tmp_path / "reply.csv")["2.png"] == ""
