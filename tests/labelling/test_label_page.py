"""`moco label`: who may talk to it, what it writes, and a real browser with a keyboard."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

from conftest import Moco, assert_one_line_error
from moco.errors import UserError
from moco.labelling.reply import Reply
from moco.labelling.server import Server, address, make_server

CLASSES = ["cat", "dog", "owl"]
HEADER = "image,label,rank,score,cluster,content"


@pytest.fixture
def form(tmp_path: Path) -> Path:
    """Six images in two clusters, which take turns."""
    path = tmp_path / "request/request.csv"
    path.parent.mkdir()
    rows = [f"{i}.png,,{i + 1},0.5,{i % 2},{i:032x}" for i in range(6)]
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    return path


@contextlib.contextmanager
def served(reply: Reply, picture: Callable[[int], np.ndarray] | None = None) -> Iterator[Server]:
    server = make_server(reply, picture or (lambda place: np.full((32, 32, 3), 40 * place, np.uint8)), 0)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(server: Server, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as found:
            return found.status, found.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def labels(path: Path) -> dict[str, str]:
    with path.open() as file:
        return {row["image"]: row["label"] for row in csv.DictReader(file)}


def test_every_answer_is_in_the_file_at_once_and_the_next_start_goes_on(form: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels/reply.csv"
    reply = Reply(form, path, CLASSES)
    assert [line.name for line in reply.lines] == ["0.png", "2.png", "4.png", "1.png", "3.png", "5.png"], "by cluster"
    with served(reply) as server:
        assert ask(server, "/answer", {"place": 1, "label": "owl"}, **{"X-Token": server.token}) == (200, b"saved")
        assert labels(path) == {"0.png": "", "1.png": "", "2.png": "owl", "3.png": "", "4.png": "", "5.png": ""}
        assert path.read_text().splitlines()[3] == f"2.png,owl,3,0.5,0,{2:032x}", "as it stood, but for the label"
        ask(server, "/answer", {"place": 0, "label": "dog"}, **{"X-Token": server.token})
        ask(server, "/answer", {"place": 1, "label": ""}, **{"X-Token": server.token})
        assert labels(path)["2.png"] == "" and labels(path)["0.png"] == "dog"
    again = Reply(form, path, CLASSES)
    assert again.answered == 1 and again.labels[0] == "dog"
    path.write_text(path.read_text().replace("0.png,dog", "0.png,1"))
    assert Reply(form, path, CLASSES).labels[0] == "dog", "a number is as good as a name"


def test_only_who_has_the_token_and_the_right_host_is_served(form: Path, tmp_path: Path) -> None:
    reply = Reply(form, tmp_path / "reply.csv", CLASSES)
    with served(reply) as server:
        good = {"X-Token": server.token}
        assert server.server_address[0] == "127.0.0.1"
        for path, body in (
            ("/", None),
            ("/state", None),
            ("/image/0", None),
            ("/answer", {"place": 0, "label": "dog"}),
        ):
            assert ask(server, path, body)[0] == 403
            assert ask(server, path, body, **{"X-Token": "guess"})[0] == 403
            assert ask(server, path, body, Host=f"evil.example:{server.server_port}", **good)[0] == 403
        assert not (tmp_path / "reply.csv").exists()
        assert ask(server, "/image/5", **good)[1].startswith(b"\x89PNG")
        for path in ("/image/6", "/image/-1", "/image/..%2f", "/secret", "/page.html"):
            assert ask(server, path, **good)[0] == 404
        bad = ({"place": 9, "label": "dog"}, {"place": 0, "label": "fox"}, {"place": True, "label": "dog"}, [1], "x",
               {"place": 0, "label": ["dog"]})  # fmt: skip
        for body in bad:
            assert ask(server, "/answer", body, **good)[0] == 400, body
        assert not (tmp_path / "reply.csv").exists()
        assert ask(server, f"/?token={server.token}")[0] == 200


def test_an_answer_that_cannot_be_written_is_told(form: Path, read_only: Path) -> None:
    with served(Reply(form, read_only / "reply.csv", CLASSES)) as server:
        code, said = ask(server, "/answer", {"place": 0, "label": "dog"}, **{"X-Token": server.token})
        assert code == 500 and b"cannot be written" in said


def test_replies_that_do_not_fit_are_refused(form: Path, tmp_path: Path) -> None:
    path = tmp_path / "reply.csv"
    path.write_text(f"{HEADER}\n0.png,cat,1,0.5,0,{0:032x}\n")
    with pytest.raises(UserError, match=r"answers an earlier request, all of it.*--reply"):
        Reply(form, path, CLASSES)
    with pytest.raises(UserError, match=r"`dvc repro` replaces"):
        Reply(form, form.parent / "deeper/reply.csv", CLASSES)
    with pytest.raises(UserError, match=r"reply.jsonl: a CSV file"):
        Reply(form, path.with_suffix(".jsonl"), CLASSES)
    path.write_text(form.read_text().replace("3.png,,", "3.png,fox,"))
    with pytest.raises(UserError, match=r"reply.csv:5: label 'fox' is no class"):
        Reply(form, path, CLASSES)
    path.write_text("image,label\n0.png,cat\n")
    with pytest.raises(UserError, match="not a request's form"):
        Reply(form, path, CLASSES)
    with pytest.raises(UserError, match="run `moco request` first"):
        Reply(tmp_path / "none/absent.csv", tmp_path / "other.csv", CLASSES)


def test_a_reply_goes_on_when_a_new_request_has_come(form: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels/reply.csv"
    reply = Reply(form, path, CLASSES)
    assert not reply.earlier
    reply.answer(0, "dog")
    form.write_text(f"{HEADER}\n9.png,,1,0.5,0,{9:032x}\n")
    again = Reply(form, path, CLASSES)
    assert again.earlier and again.answered == 1 and len(again.lines) == 6
    form.unlink()
    assert not Reply(form, path, CLASSES).earlier, "a reply has all it needs"


def test_what_another_program_wrote_is_not_overwritten(form: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels/reply.csv"
    one, other = Reply(form, path, CLASSES), Reply(form, path, CLASSES)
    one.answer(0, "dog")
    with pytest.raises(UserError, match=r"changed by another program.*again"):
        other.answer(1, "cat")
    assert other.answered == 0 and labels(path)["0.png"] == "dog" and labels(path)["2.png"] == ""


def test_the_command_serves_what_was_asked_and_ends_with_a_count(moco: Moco, project: Path) -> None:
    assert_one_line_error(moco("label"), "models/manifest.json", "moco data")
    for stage in ("data", "pretrain", "request"):
        assert moco(stage).returncode == 0
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert_one_line_error(moco("label", "--port", str(taken.getsockname()[1])), "--port", "0 for any")
    command = [sys.executable, "-m", "moco.cli", "label"]
    with subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        said = ""
        while not (found := re.search(r"http://127.0.0.1:(\d+)/\?token=(\S+)", said)):
            said += running.stdout.readline()
        url = f"http://127.0.0.1:{found[1]}/answer"
        body = json.dumps({"place": 0, "label": "3"}).encode()
        with urllib.request.urlopen(urllib.request.Request(url, body, {"X-Token": found[2]}), timeout=5) as answer:
            assert answer.read() == b"saved"
        assert_one_line_error(moco("label"), "labels/reply.csv", "another `moco label` is open on it")
        running.send_signal(signal.SIGINT)
        rest = running.stdout.read()
    assert running.returncode == 0 and "1 of 5 images answered in labels/reply.csv" in rest
    assert sorted(labels(project / "labels/reply.csv").values()) == ["", "", "", "", "3"]


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
