"""Files from the network: resumed, checked, and complete or not there.

Beside a file lies `<name>.sha256`, in the form `sha256sum -c` reads: the digest it had when it was
first used, which it must have ever after. While a file is on its way there are `<name>.partial`
and, with what the server said of it, `<name>.partial.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch
from filelock import FileLock
from tqdm import tqdm

from model.weights.catalogue import CATALOGUE, digest_of, is_known
from model.weights.files import SUFFIXES, WeightsError, read_file, write_atomically

PAUSE = 1.0  # seconds before the second attempt; then twice as long each time, up to 30 times
TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 2**20


def read(source: str | Path) -> Mapping[str, Any]:
    """What the file at a path or behind a URL holds; raises as `fetch` and `read_file` do."""
    return read_file(fetch(str(source)) if "://" in str(source) else source)


def locate(variant: str, weights: str | Path) -> str | Path:
    """The URL or path that a name of the catalogue stands for; a URL or path is itself.

    Raises:
        ValueError: not a name this variant has, nor a URL, nor anything like a path.
    """
    known = CATALOGUE.get(variant, {})
    word, path = str(weights), Path(weights)
    if word in known:
        return known[word]
    # What looks like a path is taken for one; reading it says what is wrong where nothing is.
    if "://" in word or path.suffix in SUFFIXES or len(path.parts) > 1 or path.exists():
        return weights
    names = ", ".join(known) or "none"
    raise ValueError(
        f"create: weights must be a name that {variant} has ({names}), a URL or a file, "
        f"got {word!r}"
    )


def destination(url: str, folder: str | Path | None = None) -> Path:
    """Where `fetch` puts the file of this URL; putting it there by hand is as good.

    The name is the URL's last part, behind eight digits of the URL's own digest unless the URL is
    one of the catalogue: no two URLs share a file.

    Raises:
        ValueError: not an http or https URL of a file.
    """
    parts = urlsplit(url)
    # Letters, digits, points and dashes, and only so many: it has to be a file's name everywhere.
    name = re.sub(r"[^\w.-]", "_", unquote(parts.path).rpartition("/")[2])[-50:]
    is_file = parts.scheme in ("http", "https") and parts.netloc and name
    if not is_file or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"fetch: url must be the http or https address of a file, got {url!r}")
    if is_known(url):
        name = parts.path.rpartition("/")[2]
    else:
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    folder = Path(torch.hub.get_dir(), "checkpoints") if folder is None else Path(folder)
    return folder / name


def fetch(
    url: str,
    folder: str | Path | None = None,
    sha256: str | None = None,
    *,
    attempts: int = 5,
) -> Path:
    """The path of the file behind `url`, downloaded unless it is there already.

    A download that was cut is resumed if the server gave the file an identity (a strong ETag, or
    a date); processes that want the same file at once wait for the one that gets it.

    Args:
        url: an http or https address.
        folder: where files are kept; None is torch's own (`TORCH_HOME`), which torchvision uses.
        sha256: the file's digest in hex, or at least its first 8 digits; None means those in the
            names that torchvision and mmaction2 give the files of the catalogue.
        attempts: connections to try before giving up.

    Raises:
        ValueError: not an http or https address, or no digest.
        WeightsError: no network, an answer other than the file, another length or digest than
            announced or recorded, or no place to write: one sentence, with the path at which the
            file can be put by hand.
    """
    path = destination(url, folder)
    digest = (digest_of(url) or "" if sha256 is None else sha256).lower()
    if sha256 is not None and not re.fullmatch("[0-9a-f]{8,64}", digest):
        raise ValueError(f"fetch: sha256 must be 8 to 64 hexadecimal digits, got {sha256!r}")
    try:
        if path.is_file() and _record(path).exists():
            _check(path, digest)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                _download(url, path, digest, attempts)
            else:
                _write_record(path, _check(path, digest))
    except OSError as error:
        # A shared folder that may only be read serves the files it has.
        if os.access(path, os.R_OK) and path.is_file() and not _record(path).exists():
            _check(path, digest)
            return path
        raise WeightsError(
            f"fetch: cannot use {path.parent}: {error.strerror or error}; set TORCH_HOME to "
            f"another folder, or have {url} put at {path}"
        ) from error
    return path


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _write_record(path: Path, digest: str) -> None:
    line = f"{digest}  {path.name}\n".encode()
    write_atomically(_record(path), lambda file: file.write(line))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _check(path: Path, expected: str, received: Path | None = None) -> str:
    """The digest of `path`, or of what was received for it: as announced, and as recorded.

    Raises:
        WeightsError: it is another one.
    """
    found = _sha256(received or path)
    what = f"what was received for {path}" if received else str(path)
    if not found.startswith(expected):
        cure = "" if received else "; delete it to have it fetched anew"
        raise WeightsError(f"fetch: {what} must have a SHA-256 of {expected}, got {found}{cure}")
    record = _record(path)
    if record.exists():
        line = re.match(r"([0-9a-f]{64})\b", record.read_text(errors="replace").lower())
        recorded = line[1] if line else "none that can be read"
        if found != recorded:
            raise WeightsError(
                f"fetch: {what} must have the SHA-256 of its first use, {recorded}, got {found}; "
                f"if it was meant to change, delete {record}"
            )
    return found


def _download(url: str, path: Path, expected: str, attempts: int) -> None:
    partial = path.with_name(f"{path.name}.partial")
    notes = path.with_name(f"{path.name}.partial.json")
    reason: str | None = "not tried"
    for attempt in range(attempts):
        if attempt:
            time.sleep(PAUSE * min(2 ** (attempt - 1), 30))
        try:
            reason = _receive(url, partial, notes)
        except HTTPError as error:
            reason = _line(f"the server answers {error.code} {error.reason}")
            if error.code < 500 and error.code not in (408, 416, 429):
                break
            if error.code == 416:
                notes.unlink(missing_ok=True)
        except (OSError, HTTPException, ValueError) as error:
            reason = _line(str(getattr(error, "reason", error))) or repr(error)
        if reason is None:
            break
    if reason is not None:
        raise WeightsError(f"fetch: cannot get {url}: {reason}; a copy of it can be put at {path}")
    try:
        digest = _check(path, expected, partial)
    except WeightsError:
        partial.unlink()
        notes.unlink(missing_ok=True)
        raise
    _write_record(path, digest)
    os.replace(partial, path)
    notes.unlink(missing_ok=True)


def _line(text: str) -> str:
    return " ".join(text.split())


def _receive(url: str, partial: Path, notes: Path) -> str | None:
    """Receive the file, or the rest of it; None if it is now whole, else what is wrong.

    Raises:
        OSError, HTTPException, ValueError: what the network does and urllib says of it.
        WeightsError: the disk does not take it.
    """
    have, known = _begun(partial, notes)
    if have and have == known.get("length"):
        return None
    headers = {"User-Agent": "videoswin-kernels", "Accept-Encoding": "identity"}
    if have:
        # The server sends the rest if the file still is the one begun, else the whole new one.
        headers |= {"Range": f"bytes={have}-", "If-Range": known["validator"]}
    with _OPENER.open(Request(url, headers=headers), timeout=TIMEOUT) as response:
        kind = response.headers.get_content_type()
        encoding = response.headers.get("Content-Encoding", "identity")
        # A login page of the network in between would be recorded as the file.
        if response.status not in (200, 206) or kind == "text/html" or encoding != "identity":
            return f"the server answers {response.status} with {kind} in {encoding} encoding"
        if response.status == 206:
            length = known.get("length", 0)
            expected = f"bytes {have}-{length - 1}/{length}" if have else "none"
            is_other = _validator(response) not in (None, known.get("validator"))
            if is_other or response.headers.get("Content-Range") != expected:
                notes.unlink(missing_ok=True)
                return "the server sent another part, or file, than it was asked for"
        else:
            have, known = 0, {"validator": _validator(response), "length": response.length}
        with _Partial(partial, notes, None if have else known) as file:
            bar = tqdm(
                initial=have,
                total=known["length"],
                desc=partial.stem,
                unit="B",
                unit_scale=True,
                disable=None,
            )
            with bar:
                while block := response.read(_CHUNK):
                    file.write(block)
                    bar.update(len(block))
    size = partial.stat().st_size
    if known["length"] in (None, size):
        return None
    return f"the server sent {size} of {known['length']} bytes"


def _begun(partial: Path, notes: Path) -> tuple[int, dict[str, Any]]:
    """How many bytes are here of a download that can be resumed, and what is known of it."""
    try:
        known = json.loads(notes.read_bytes())
        size = partial.stat().st_size
    except (FileNotFoundError, ValueError):
        return 0, {}
    if not isinstance(known, dict):
        return 0, {}
    length = known.get("length")
    if not known.get("validator") or not isinstance(length, int) or size > length:
        return 0, {}
    return size, known


def _validator(response: HTTPResponse) -> str | None:
    """What tells this file from a later one under the same URL, if the server gives it."""
    tag = response.headers.get("ETag", "")
    # A weak tag, W/"...", does not promise the same bytes.
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


class _Redirects(HTTPRedirectHandler):
    """Follows to http and https, but from https to nothing less."""

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        allowed = {"https"} if req.type == "https" else {"http", "https"}
        if urlsplit(newurl).scheme not in allowed:
            raise HTTPError(req.full_url, code, f"and leads to {newurl}", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = build_opener(_Redirects)


class _Partial:
    """The partial file, open to append to; with notes, begun anew. Refusals of the disk are final.

    Raises:
        WeightsError: the disk does not take it; unlike the network's, this is not tried again.
    """

    def __init__(self, path: Path, notes: Path, begin: dict[str, Any] | None) -> None:
        self.path = path
        with self._refusals():
            if begin is not None:
                # In this order: whenever there are notes, they are those of the bytes beside them.
                notes.unlink(missing_ok=True)
                path.write_bytes(b"")
                write_atomically(notes, lambda file: file.write(json.dumps(begin).encode()))
            self.file = open(path, "ab")  # noqa: SIM115

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise WeightsError(f"fetch: cannot write to {self.path}: {reason}") from error

    def __enter__(self) -> _Partial:
        return self

    def write(self, block: bytes) -> None:
        with self._refusals():
            self.file.write(block)

    def __exit__(self, *_: object) -> None:
        with self._refusals(), self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
