"""A web server on this machine that misbehaves as told, and what tests ask of a download."""

import hashlib
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread

import pytest

from model.weights import WeightsError
from model.weights.download import destination, fetch

ROOT = Path(__file__).parents[1]
NOBODY = 65534
CONTENT = random.Random(1).randbytes(300_001)
# As long as the first: a mixture of the two shows in its bytes alone.
OTHER = random.Random(2).randbytes(300_001)
CUT = 100_003
BLOCK = 4096
# Far in the past, so that it is a strong validator (RFC 9110, 8.8.2.2).
MODIFIED = "Wed, 21 Oct 2020 07:28:00 GMT"
# A client that never comes back must not keep the suite waiting.
PATIENCE = 30.0


@dataclass(frozen=True)
class Reply:
    """How the answer to one GET differs from that of a good server.

    Args:
        status: send this error, or redirection, instead of the file.
        location: where a redirection leads.
        cut: close the connection after so many bytes of the body.
        longer: bytes that Content-Length claims beyond (below 0: short of) those there are.
        ranges: whether Range is honoured; otherwise 200 with the whole file.
        if_range: whether If-Range is; otherwise 206 whatever the file has become.
        earlier: a 206 starts so many bytes before the one asked for, and says so.
        total: bytes that Content-Range claims beyond those of the file.
        sized: whether there is a Content-Length; otherwise the end of the connection is the end.
        chunked: chunks instead of Content-Length.
        pause: seconds between blocks of 4096 bytes.
        stall: send so many bytes of the body, then nothing until `resume` is set; -1 is not even
            the headers.
    """

    status: int | None = None
    location: str | None = None
    cut: int | None = None
    longer: int = 0
    ranges: bool = True
    if_range: bool = True
    earlier: int = 0
    total: int = 0
    sized: bool = True
    chunked: bool = False
    pause: float = 0.0
    stall: int | None = None
    resume: Event = field(default_factory=Event)


GOOD = Reply()


@dataclass
class Page:
    """A file of the server: its next GETs get the replies of `script`, later ones `always`."""

    content: bytes
    etag: str | None = '"first"'
    modified: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    script: list[Reply] = field(default_factory=list)
    always: Reply = GOOD


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Message


class Server:
    """Files by path, and the requests for them in the order they came."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.pages: dict[str, Page] = {}
        self.requests: list[Request] = []
        self.stalled = Event()

    def serve(self, path: str, content: bytes, *script: Reply, **page) -> str:
        """The URL of a file, which replaces what was there; see `Page`."""
        self.pages[path] = Page(content, script=list(script), **page)
        return self.address + path

    def ranges(self) -> list[str | None]:
        """The Range header of each GET."""
        return [asked.headers["Range"] for asked in self.requests if asked.method == "GET"]


@contextmanager
def running_server() -> Iterator[Server]:
    http = _HTTPServer(("127.0.0.1", 0), _Handler)
    http.suite = Server(f"http://127.0.0.1:{http.server_port}")
    thread = Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield http.suite
    finally:
        for page in http.suite.pages.values():
            for reply in (*page.script, page.always):
                reply.resume.set()
        http.shutdown()
        http.server_close()
        thread.join()


class _HTTPServer(ThreadingHTTPServer):
    suite: Server

    def handle_error(self, request, client_address) -> None:
        """Says nothing: clients that vanish are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _HTTPServer

    def log_message(self, *_) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self._answer(GOOD)

    def do_GET(self) -> None:
        page = self.server.suite.pages.get(self.path)
        script = [] if page is None else page.script
        self._answer(script.pop(0) if script else GOOD if page is None else page.always)

    def _answer(self, reply: Reply) -> None:
        suite = self.server.suite
        suite.requests.append(Request(self.command, self.path, self.headers))
        self.close_connection = True
        if reply.stall == -1:
            suite.stalled.set()
            reply.resume.wait(PATIENCE)
        page = suite.pages.get(self.path)
        if page is None or reply.status is not None:
            status = 404 if reply.status is None else reply.status
            where = {} if reply.location is None else {"Location": reply.location}
            self._send(status, {"Content-Length": "0", **where}, b"", GOOD)
        else:
            self._send(*_answer_to(self.headers, page, reply), reply)

    def _send(self, status: int, headers: dict[str, str], body: bytes, reply: Reply) -> None:
        self.send_response(status)
        for name, value in {**headers, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with suppress(OSError):
                self._send_body(body, reply)

    def _send_body(self, body: bytes, reply: Reply) -> None:
        is_cut = reply.cut is not None and reply.cut < len(body)
        body = body[: reply.cut]
        stops = {*range(0, len(body), BLOCK), len(body)}
        if reply.stall is not None and reply.stall >= 0:
            stops.add(reply.stall)
        for start, stop in pairwise(sorted(stops)):
            if start == reply.stall:
                self._stall(reply)
            block = body[start:stop]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block) if reply.chunked else block)
            time.sleep(reply.pause)
        if reply.stall == len(body):
            self._stall(reply)
        if reply.chunked and not is_cut:
            self.wfile.write(b"0\r\n\r\n")

    def _stall(self, reply: Reply) -> None:
        self.server.suite.stalled.set()
        reply.resume.wait(PATIENCE)


def _answer_to(asked: Message, page: Page, reply: Reply) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) by RFC 9110, 14.2, except where `reply` differs."""
    headers = {"Accept-Ranges": "bytes", **page.headers}
    if page.etag is not None:
        headers["ETag"] = page.etag
    if page.modified is not None:
        headers["Last-Modified"] = page.modified
    size, start = len(page.content), None
    if reply.ranges and (found := re.fullmatch(r"bytes=(\d+)-", asked["Range"] or "")):
        start = int(found[1])
    # A weak ETag matches nothing here: the comparison is the strong one.
    is_strong = page.etag is not None and not page.etag.startswith("W/")
    validators = [page.modified, page.etag if is_strong else None]
    condition = asked["If-Range"]
    if reply.if_range and condition is not None and condition not in validators:
        start = None
    if start is not None and start >= size:
        return 416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"}, b""
    if start is None:
        status, body = 200, page.content
    else:
        start = max(start - reply.earlier, 0)
        status, body = 206, page.content[start:]
        headers["Content-Range"] = f"bytes {start}-{size - 1}/{size + reply.total}"
    if reply.chunked:
        headers["Transfer-Encoding"] = "chunked"
    elif reply.sized:
        headers["Content-Length"] = str(len(body) + reply.longer)
    return status, headers, body


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of each file by its name, locks left out."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def assert_fetched(url: str, folder: Path, content: bytes = CONTENT, **arguments) -> None:
    """`fetch` gives exactly these bytes, recorded, and leaves nothing else."""
    path = fetch(url, folder, **arguments)
    assert path == destination(url, folder)
    name = path.name
    record = f"{digest(content)}  {name}\n".encode()
    assert contents(folder) == {name: content, f"{name}.sha256": record}


def refusal(url: str, folder: Path, **arguments) -> str:
    """The one line that `fetch` refuses with."""
    with pytest.raises(WeightsError) as caught:
        fetch(url, folder, **arguments)
    said = str(caught.value)
    assert len(said.splitlines()) == 1, said
    return said


def begin(server: Server, folder: Path, *later: Reply, **page) -> str:
    """The URL of a file of which a first call got `CUT` bytes."""
    url = server.serve("/model.pth", CONTENT, Reply(cut=CUT), *later, **page)
    refusal(url, folder, attempts=1)
    path = destination(url, folder)
    assert beside(path, ".partial").read_bytes() == CONTENT[:CUT]
    assert not path.exists()
    return url


def assert_fetched_at_last(url: str, folder: Path, content: bytes) -> None:
    """The bytes are right; the call that met the lie may refuse, the one after it may not."""
    try:
        fetch(url, folder)
    except WeightsError:
        assert not destination(url, folder).exists()
    assert_fetched(url, folder, content)


@contextmanager
def unprivileged() -> Iterator[None]:
    """As somebody whom permissions bind; root may return, for its saved id stays."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


PROGRAM = """
import sys
from model.weights import download
download.PAUSE = 0
print("ready", flush=True)
sys.stdin.readline()
print(download.fetch(*sys.argv[1:]), flush=True)
"""


@contextmanager
def fetching(url: str, folder: Path, count: int) -> Iterator[list[subprocess.Popen]]:
    """So many processes, each about to fetch once it is sent a line."""
    arguments = [sys.executable, "-c", PROGRAM, url, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    processes = [subprocess.Popen(arguments, **pipes) for _ in range(count)]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()
