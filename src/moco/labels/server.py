"""The page's server: on this machine alone, for whoever has the token."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import secrets
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from moco.data.manifest import load_manifest
from moco.data.prepare import open_decoded
from moco.errors import Interrupted, Say, UserError
from moco.files import scratch_folder
from moco.labels.reply import AnsweredMeanwhileError, Reply
from moco.layout import FORM, MANIFEST, RUNS
from moco.settings.schema import Config

HOST = "127.0.0.1"
LONGEST = 10_000  # bytes of an answer


def run(config: Config, path: Path, port: int, say: Say) -> None:
    """Serve the page until a signal stops it.

    Raises UserError where form, reply and pool do not fit each other, and where another process serves the same reply.
    """
    # Not beside the reply: DVC looks for changes there.
    place = RUNS / "label" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}.lock"
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place).acquire(timeout=0):
            _run(config, path, port, say)
    except Timeout:
        raise UserError(f"{path}: another `moco label` is open on it; go on there, or stop it") from None


def _run(config: Config, path: Path, port: int, say: Say) -> None:
    manifest = load_manifest(MANIFEST)
    pool = open_decoded(config.data, manifest, scratch_folder(config.runtime.scratch), say)["unlabeled"]
    reply = Reply(FORM, path, manifest.classes, say)
    rows = {bytes(digest).hex(): row for row, digest in enumerate(pool.digests)}
    for line in reply.lines:
        if line.content not in rows:
            raise UserError(f"{line.place}: '{line.name}' is not in the unlabelled pool; run `moco request` again")

    def picture(place: int) -> np.ndarray:
        return np.asarray(pool.images[rows[reply.lines[place].content]])

    server = make_server(reply, picture, port)
    if reply.earlier:
        say(f"label: {path} answers an earlier request; to answer the new one, name another file with --reply")
    say(f"label: {reply.answered} of {len(reply.lines)} images answered; answers go to {path}")
    say(f"label: open {address(server)} in a browser on this machine; Ctrl-C ends it, nothing gets lost")
    say(f"label: from your desk: ssh -L {server.server_port}:{HOST}:{server.server_port} USER@THIS-MACHINE")
    try:
        server.serve_forever()
    except (Interrupted, KeyboardInterrupt):
        say(f"label: {reply.answered} of {len(reply.lines)} images answered in {path}")
        if reply.answered:
            say(f"label: to train with them, set train_extra.labels: {path}")
    finally:
        server.server_close()


def address(server: Server) -> str:
    """Return the address of the page, with the token."""
    return f"http://{HOST}:{server.server_port}/?token={server.token}"


class Handler(BaseHTTPRequestHandler):
    """Answers GET / (the page), /state, /changes?since=VERSION, /image/PLACE, and POST /answer.

    A version is the number of answers so far. Pages ask for the changes since theirs, which tells them what others have
    answered, and that the server still lives.
    """

    server: Server

    def do_GET(self) -> None:
        """Send the page, the state, the changes since a version, or an image; refuse any other request."""
        path = urlsplit(self.path).path
        if not self._allowed():
            return
        if path == "/":
            self._send(self.server.page.encode(), "text/html; charset=utf-8")
        elif path == "/state":
            self._send_json(self.server.state())
        elif path == "/changes":
            self._send_json(self.server.changes(parse_qs(urlsplit(self.path).query).get("since", [""])[0]))
        elif path.startswith("/image/") and (place := _place(path[7:], len(self.server.reply.lines))) is not None:
            data = io.BytesIO()
            Image.fromarray(self.server.picture(place)).save(data, "png")
            self._send(data.getvalue(), "image/png")
        else:
            self._refuse(404, "not found")

    def do_POST(self) -> None:
        """Take an answer and send the changes; refuse a request that is no valid answer."""
        if not self._allowed():
            return
        length = _place(self.headers.get("Content-Length", ""), LONGEST)
        try:
            given = json.loads(self.rfile.read(length or 0))
            place, label, before = given["place"], given["label"], given["before"]
        except (ValueError, KeyError, TypeError, RecursionError):
            self._refuse(400, "an object with place, label and before (the label that was shown) is expected")
            return
        if type(place) is not int or not 0 <= place < len(self.server.reply.lines):
            self._refuse(400, "no such image")
        elif label != "" and label not in self.server.reply.classes:
            self._refuse(400, "no such class")
        elif urlsplit(self.path).path != "/answer":
            self._refuse(404, "not found")
        else:
            self._answer(place, label, before, str(given.get("since", "")))

    def _answer(self, place: int, label: str, before: str, since: str) -> None:
        """Send the changes since the page's version, with the answer among them, or say why the answer is not saved."""
        try:
            with self.server.lock:
                self.server.reply.answer(place, label, before)
        except AnsweredMeanwhileError as error:
            self._send_json({"problem": str(error), **self.server.changes(since)}, 409)
        except UserError as error:
            self._refuse(500, str(error))
        else:
            self._send_json(self.server.changes(since))

    def _allowed(self) -> bool:
        """Return whether a request has the right host and token; refuse it otherwise.

        A page elsewhere that has its name point here (DNS rebinding) sends its own name as Host.
        """
        port = self.server.server_port
        wanted = {f"{name}:{port}" if port != 80 else name for name in (HOST, "localhost")}
        given = self.headers.get("X-Token") or parse_qs(urlsplit(self.path).query).get("token", [""])[0]
        if self.headers.get("Host") not in wanted:
            self._refuse(403, "wrong host")
            return False
        if not hmac.compare_digest(given.encode(), self.server.token.encode()):
            self._refuse(403, "wrong token; open the address that `moco label` printed")
            return False
        return True

    def _refuse(self, code: int, why: str) -> None:
        self._send(why.encode(), "text/plain; charset=utf-8", code)

    def _send_json(self, content: dict[str, Any], code: int = 200) -> None:
        self._send(json.dumps(content).encode(), "application/json", code)

    def _send(self, content: bytes, kind: str, code: int = 200) -> None:
        self.send_response(code)
        for name, value in (
            ("Content-Type", kind), ("Content-Length", str(len(content))),
            ("Content-Security-Policy", self.server.policy), ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"),
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: the terminal is for what the user must know."""


class Server(ThreadingHTTPServer):
    """The server of the page for one reply.

    token: what a request must bring. picture: returns the image shown at a place, uint8 H x W x 3.
    """

    daemon_threads = True

    def __init__(self, reply: Reply, picture: Callable[[int], np.ndarray], port: int) -> None:
        self.reply, self.picture, self.lock = reply, picture, Lock()
        self.token, nonce = secrets.token_urlsafe(24), secrets.token_urlsafe(12)
        page = files("moco.labels").joinpath("page.html").read_text(encoding="utf-8")
        self.page = page.replace("NONCE", nonce)
        self.policy = (
            f"default-src 'none'; img-src 'self'; connect-src 'self'; script-src 'nonce-{nonce}'; "
            f"style-src 'nonce-{nonce}'; frame-ancestors 'none'; base-uri 'none'"
        )
        super().__init__((HOST, port), Handler)

    def state(self) -> dict[str, Any]:
        """Return all that a page shows, and the version that it is of."""
        with self.lock:
            names, labels = [line.name for line in self.reply.lines], self.reply.labels
            return {"classes": self.reply.classes, "names": names, "labels": labels, "version": self._version}

    def changes(self, since: str) -> dict[str, Any]:
        """Return the answers since a version, all where it is none, as [place, label], and the present version."""
        with self.lock:
            first = _place(since, self._version + 1) or 0
            return {"changes": self.reply.changes[first:], "version": self._version}

    @property
    def _version(self) -> int:
        return len(self.reply.changes)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report any error but that of a browser that went away."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def make_server(reply: Reply, picture: Callable[[int], np.ndarray], port: int) -> Server:
    """Return a server bound to localhost; port 0 takes a free port. Raises UserError where the port is taken."""
    try:
        return Server(reply, picture, port)
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}; name another, or 0 for any that is free") from None


def _place(text: str, count: int) -> int | None:
    """Return a whole number below `count`, or None for any other text."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 9 and int(text) < count else None
