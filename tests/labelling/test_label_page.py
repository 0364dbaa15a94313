"""`moco label`: who may talk to it, and what it writes."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from label_helpers import CLASSES, HEADER, labels, served, write_form

from conftest import Moco, assert_one_line_error
from moco.errors import UserError
from moco.labels.reply import Reply
from moco.labels.server import Server


@pytest.fixture
def form(tmp_path: Path) -> Path:
    return write_form(tmp_path)


def ask(server: Server, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as found:
            return found.status, found.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_every_answer_is_in_the_file_at_once_and_the_next_start_goes_on(form: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels/reply.csv"
    reply = Reply(form, path, CLASSES)
    assert [line.name for line in reply.lines] == ["0.png", "2.png", "4.png", "1.png", "3.png", "5.png"], "by cluster"
    with served(reply) as server:
        code, said = ask(server, "/answer", {"place": 1, "label": "owl", "before": ""}, **{"X-Token": server.token})
        assert (code, json.loads(said)) == (200, {"changes": [[1, "owl"]], "version": 1})
        assert labels(path) == {"0.png": "", "1.png": "", "2.png": "owl", "3.png": "", "4.png": "", "5.png": ""}
        assert path.read_text().splitlines()[3] == f"2.png,owl,3,0.5,0,{2:032x}", "as it stood, but for the label"
        ask(server, "/answer", {"place": 0, "label": "dog", "before": ""}, **{"X-Token": server.token})
        ask(server, "/answer", {"place": 1, "label": "", "before": "owl"}, **{"X-Token": server.token})
        assert labels(path)["2.png"] == "" and labels(path)["0.png"] == "dog"
    again = Reply(form, path, CLASSES)
    assert again.answered == 1 and again.labels[0] == "dog"
    path.write_text(path.read_text().replace("0.png,dog", "0.png,1"))
    assert Reply(form, path, CLASSES).labels[0] == "dog", "a number is as good as a name"


@pytest.mark.fault("strangers")
def test_only_who_has_the_token_and_the_right_host_is_served(form: Path, tmp_path: Path) -> None:
    reply = Reply(form, tmp_path / "reply.csv", CLASSES)
    with served(reply) as server:
        good = {"X-Token": server.token}
        assert server.server_address[0] == "127.0.0.1"
        for path, body in (
            ("/", None),
            ("/state", None),
            ("/image/0", None),
            ("/answer", {"place": 0, "label": "dog", "before": ""}),
        ):
            assert ask(server, path, body)[0] == 403
            assert ask(server, path, body, **{"X-Token": "guess"})[0] == 403
            assert ask(server, path, body, Host=f"evil.example:{server.server_port}", **good)[0] == 403
        assert not (tmp_path / "reply.csv").exists()
        assert ask(server, "/image/5", **good)[1].startswith(b"\x89PNG")
        for path in ("/image/6", "/image/-1", "/image/..%2f", "/secret", "/page.html"):
            assert ask(server, path, **good)[0] == 404
        bad = ({"place": 9, "label": "dog", "before": ""}, {"place": 0, "label": "fox", "before": ""}, [1], "x",
               {"place": True, "label": "dog", "before": ""}, {"place": 0, "label": ["dog"], "before": ""},
               {"place": 0, "label": "dog"})  # fmt: skip
        for body in bad:
            assert ask(server, "/answer", body, **good)[0] == 400, body
        assert not (tmp_path / "reply.csv").exists()
        assert ask(server, f"/?token={server.token}")[0] == 200


@pytest.mark.fault("read-only")
def test_an_answer_that_cannot_be_written_is_told(form: Path, read_only: Path) -> None:
    with served(Reply(form, read_only / "reply.csv", CLASSES)) as server:
        code, said = ask(server, "/answer", {"place": 0, "label": "dog", "before": ""}, **{"X-Token": server.token})
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
    reply.answer(0, "dog", "")
    form.write_text(f"{HEADER}\n9.png,,1,0.5,0,{9:032x}\n")
    again = Reply(form, path, CLASSES)
    assert again.earlier and again.answered == 1 and len(again.lines) == 6
    form.unlink()
    assert not Reply(form, path, CLASSES).earlier, "a reply has all it needs"


def test_what_another_program_wrote_is_not_overwritten(form: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels/reply.csv"
    one, other = Reply(form, path, CLASSES), Reply(form, path, CLASSES)
    one.answer(0, "dog", "")
    with pytest.raises(UserError, match=r"changed by another program.*again"):
        other.answer(1, "cat", "")
    assert other.answered == 0 and labels(path)["0.png"] == "dog" and labels(path)["2.png"] == ""


@pytest.mark.fault("two-pages", 4)
def test_an_answer_replaces_only_what_its_giver_has_seen(form: Path, tmp_path: Path) -> None:
    path = tmp_path / "reply.csv"
    with served(Reply(form, path, CLASSES)) as server:

        def answer(label: str, before: str, since: int) -> tuple[int, Any]:
            body = {"place": 0, "label": label, "before": before, "since": since}
            code, said = ask(server, "/answer", body, **{"X-Token": server.token})
            return code, json.loads(said)

        assert answer("dog", "", 0) == (200, {"changes": [[0, "dog"]], "version": 1})
        for label, before in (("cat", ""), ("", ""), ("owl", "cat")):
            code, said = answer(label, before, 0)
            assert code == 409 and "'dog'" in said["problem"] and said["changes"] == [[0, "dog"]], (label, before)
            assert labels(path)["0.png"] == "dog"
        assert answer("dog", "owl", 1) == (200, {"changes": [], "version": 1}), "as it is: nothing is lost"
        assert answer("owl", "dog", 1)[0] == 200 and labels(path)["0.png"] == "owl"
        assert answer("", "owl", 2)[0] == 200 and labels(path)["0.png"] == ""
        assert answer("cat", "owl", 3)[0] == 409, "it was taken back"
        found = json.loads(ask(server, "/changes?since=2", **{"X-Token": server.token})[1])
        assert found == {"changes": [[0, ""]], "version": 3}
        for since in ("", "9", "-1", "x"):
            assert json.loads(ask(server, f"/changes?since={since}", **{"X-Token": server.token})[1])["version"] == 3


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
        body = json.dumps({"place": 0, "label": "3", "before": ""}).encode()
        with urllib.request.urlopen(urllib.request.Request(url, body, {"X-Token": found[2]}), timeout=5) as answer:
            assert json.loads(answer.read())["version"] == 1
        assert_one_line_error(moco("label"), "labels/reply.csv", "another `moco label` is open on it")
        running.send_signal(signal.SIGINT)
        rest = running.stdout.read()
    assert running.returncode == 0 and "1 of 5 images answered in labels/reply.csv" in rest
    assert sorted(labels(project / "labels/reply.csv").values()) == ["", "", "", "", "3"]
