"""What `fetch` keeps of a file from the web, whatever server, disk or a kill do."""

import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from http_suite import (
    CONTENT,
    CUT,
    MODIFIED,
    OTHER,
    Reply,
    assert_fetched,
    assert_fetched_at_last,
    begin,
    beside,
    contents,
    digest,
    fetching,
    refusal,
    unprivileged,
)

from model.weights import WeightsError
from model.weights.download import destination, fetch


@pytest.mark.parametrize(
    "reply",
    [Reply(), Reply(chunked=True), Reply(sized=False), Reply(pause=0.002)],
    ids=["plain", "chunked", "without length", "slow"],
)
def test_a_file_is_fetched_once_and_recorded(server, tmp_path, reply):
    url = server.serve("/model.pth", CONTENT, reply)
    folder = tmp_path / "not" / "there"
    assert_fetched(url, folder)
    asked = list(server.requests)
    assert asked
    assert_fetched(url, folder)
    assert server.requests == asked


def test_sha256sum_reads_the_record(server, tmp_path):
    if shutil.which("sha256sum") is None:
        pytest.skip("there is no sha256sum")
    path = fetch(server.serve("/model.pth", CONTENT), tmp_path)
    check = ["sha256sum", "--check", "--strict", f"{path.name}.sha256"]
    assert subprocess.run(check, cwd=tmp_path).returncode == 0
    path.write_bytes(OTHER)
    assert subprocess.run(check, cwd=tmp_path).returncode == 1


def test_the_default_folder_is_that_of_torch_hub(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = server.serve("/model.pth", CONTENT)
    assert fetch(url).parent == destination(url).parent == tmp_path / "hub" / "checkpoints"


def test_a_file_put_there_by_hand_is_recorded_and_checked(server, tmp_path):
    url = server.serve("/model.pth", CONTENT)
    destination(url, tmp_path).write_bytes(OTHER)
    assert_fetched(url, tmp_path, OTHER)
    assert not server.requests
    destination(url, tmp_path).write_bytes(CONTENT)
    assert digest(OTHER) in refusal(url, tmp_path)


def assert_refused_and_kept(server, path, url, *words, **arguments):
    """Refused in a line with these words, without a request, and no file changes."""
    before, asked = contents(path.parent), len(server.requests)
    said = refusal(url, path.parent, **arguments)
    for word in (str(path), *words):
        assert word in said
    assert contents(path.parent) == before
    assert len(server.requests) == asked


def test_a_file_that_changed_on_disk_is_refused_and_kept(server, tmp_path):
    url = server.serve("/model.pth", CONTENT)
    path = fetch(url, tmp_path)
    digests = digest(CONTENT), digest(OTHER)
    assert_refused_and_kept(server, path, url, *digests, sha256=digest(OTHER))
    path.write_bytes(OTHER)
    assert_refused_and_kept(server, path, url, *digests, f"{path.name}.sha256")


@pytest.mark.parametrize("record", [b"", b"\n", b"7\n", b"two\nlines\n", b"\xff\xfe"])
def test_a_record_that_is_none_is_refused_and_kept(server, tmp_path, record):
    url = server.serve("/model.pth", CONTENT)
    path = fetch(url, tmp_path)
    beside(path, ".sha256").write_bytes(record)
    assert_refused_and_kept(server, path, url, f"{path.name}.sha256")


@pytest.mark.parametrize("length", [8, 16, 64])
@pytest.mark.parametrize("spell", [str.lower, str.upper])
def test_the_right_digest_is_accepted(server, tmp_path, length, spell):
    known = spell(digest(CONTENT)[:length])
    url = server.serve("/model.pth", CONTENT)
    assert_fetched(url, tmp_path, sha256=known)
    assert_fetched(url, tmp_path, sha256=known)


# The last differs at its end alone.
@pytest.mark.parametrize("wrong", [digest(OTHER)[:8], digest(OTHER), digest(CONTENT)[:-1] + "5"])
def test_a_download_of_another_digest_is_deleted(server, tmp_path, wrong):
    url = server.serve("/model.pth", CONTENT)
    said = refusal(url, tmp_path, sha256=wrong)
    assert wrong in said
    assert digest(CONTENT) in said
    assert contents(tmp_path) == {}
    assert_fetched(url, tmp_path)
    assert server.ranges() == [None, None]


def test_a_download_that_contradicts_the_record_is_deleted(server, tmp_path):
    url = server.serve("/model.pth", CONTENT)
    path = fetch(url, tmp_path)
    path.unlink()
    before = contents(tmp_path)
    server.serve("/model.pth", OTHER, etag='"second"')
    said = refusal(url, tmp_path)
    assert digest(CONTENT) in said
    assert digest(OTHER) in said
    assert contents(tmp_path) == before
    server.serve("/model.pth", CONTENT)
    assert_fetched(url, tmp_path)
    assert server.ranges() == [None, None, None]


@pytest.mark.parametrize(
    ("page", "validator"),
    [
        ({}, '"first"'),
        ({"etag": None, "modified": MODIFIED}, MODIFIED),
        ({"etag": 'W/"first"', "modified": MODIFIED}, MODIFIED),
    ],
    ids=["etag", "date", "date and weak etag"],
)
def test_a_later_call_goes_on_where_the_connection_broke(server, tmp_path, page, validator):
    url = begin(server, tmp_path, **page)
    assert_fetched(url, tmp_path)
    assert server.ranges() == [None, f"bytes={CUT}-"]
    assert server.requests[-1].headers["If-Range"] == validator


def test_a_call_goes_on_where_the_connection_broke(server, tmp_path):
    cuts = [Reply(cut=cut) for cut in (CUT, 1, 0, 8192)]
    url = server.serve("/model.pth", CONTENT, *cuts)
    assert_fetched(url, tmp_path)
    starts = [CUT, CUT + 1, CUT + 1, CUT + 8193]
    assert server.ranges() == [None, *(f"bytes={start}-" for start in starts)]
    assert {asked.headers["If-Range"] for asked in server.requests[1:]} == {'"first"'}


def test_a_download_goes_on_behind_a_redirection(server, tmp_path):
    server.serve("/store/8c1f", CONTENT, Reply(cut=CUT))
    url = server.serve("/model.pth", b"", always=Reply(status=302, location="/store/8c1f"))
    assert_fetched(url, tmp_path)
    stored = [asked for asked in server.requests if asked.path == "/store/8c1f"]
    assert [asked.headers["Range"] for asked in stored] == [None, f"bytes={CUT}-"]
    assert stored[1].headers["If-Range"] == '"first"'


def test_chunks_that_break_off_are_no_whole_file(server, tmp_path):
    broken, whole = Reply(cut=CUT, chunked=True), Reply(chunked=True)
    url = server.serve("/model.pth", CONTENT, always=broken)
    refusal(url, tmp_path, attempts=2)
    assert not destination(url, tmp_path).exists()
    server.serve("/model.pth", CONTENT, broken, always=whole)
    assert_fetched(url, tmp_path)


@pytest.mark.parametrize("attempts", [1, 3, 5])
def test_a_connection_that_keeps_breaking_is_given_up(server, tmp_path, attempts):
    url = server.serve("/model.pth", CONTENT, Reply(cut=CUT), always=Reply(cut=0))
    said = refusal(url, tmp_path, **({} if attempts == 5 else {"attempts": attempts}))
    assert str(CUT) in said
    assert str(len(CONTENT)) in said
    assert len(server.requests) == attempts
    assert beside(destination(url, tmp_path), ".partial").read_bytes() == CONTENT[:CUT]
    server.serve("/model.pth", CONTENT)
    assert_fetched(url, tmp_path)
    assert server.ranges()[-1] == f"bytes={CUT}-"


@pytest.mark.parametrize("new", [OTHER, OTHER[:-9], OTHER[:50], OTHER * 2], ids=len)
@pytest.mark.parametrize(
    ("old", "changed"),
    [
        ({}, {"etag": '"second"'}),
        (
            {"etag": None, "modified": MODIFIED},
            {"etag": None, "modified": "Thu, 22 Oct 2020 07:28:00 GMT"},
        ),
    ],
    ids=["etag", "date"],
)
def test_a_file_that_changed_on_the_server_is_fetched_anew(server, tmp_path, new, old, changed):
    url = begin(server, tmp_path, **old)
    server.serve("/model.pth", new, **changed)
    assert_fetched(url, tmp_path, new)


def test_a_file_may_change_twice(server, tmp_path):
    url = begin(server, tmp_path)
    server.serve("/model.pth", OTHER, Reply(cut=9), etag='"second"')
    refusal(url, tmp_path, attempts=1)
    assert_fetched(url, tmp_path, OTHER)
    assert server.ranges() == [None, f"bytes={CUT}-", "bytes=9-"]
    assert server.requests[-1].headers["If-Range"] == '"second"'


@pytest.mark.parametrize("etag", [None, 'W/"first"'])
@pytest.mark.parametrize("attempts", [1, 5])
def test_without_a_strong_validator_a_download_starts_over(server, tmp_path, etag, attempts):
    if attempts == 1:
        url = begin(server, tmp_path, etag=etag)
    else:
        url = server.serve("/model.pth", CONTENT, Reply(cut=CUT), etag=etag)
    assert_fetched(url, tmp_path)
    assert server.ranges() == [None, None]


@pytest.mark.parametrize(
    ("answer", "more"), [(Reply(ranges=False), []), (Reply(status=416), [None])], ids=["200", "416"]
)
def test_a_server_that_sends_no_part_starts_over(server, tmp_path, answer, more):
    url = begin(server, tmp_path, answer)
    assert_fetched(url, tmp_path)
    assert server.ranges() == [None, f"bytes={CUT}-", *more]


def test_a_server_that_satisfies_nothing_is_given_up(server, tmp_path):
    url = begin(server, tmp_path, always=Reply(status=416))
    assert "416" in refusal(url, tmp_path)
    assert len(server.requests) <= 1 + 5


@pytest.mark.parametrize(
    "lie",
    [
        Reply(earlier=7),
        Reply(earlier=7, cut=len(CONTENT) - CUT),
        Reply(earlier=CUT),
        Reply(total=3),
        Reply(total=-3),
    ],
    ids=["earlier", "earlier and cut", "from 0", "of a longer file", "of a shorter file"],
)
def test_a_part_that_does_not_fit_is_not_appended(server, tmp_path, lie):
    assert_fetched_at_last(begin(server, tmp_path, lie), tmp_path, CONTENT)


def test_a_part_of_a_changed_file_is_not_appended(server, tmp_path):
    url = begin(server, tmp_path)
    server.serve("/model.pth", OTHER, Reply(if_range=False), etag='"second"')
    assert_fetched_at_last(url, tmp_path, OTHER)


@pytest.mark.parametrize("spoil", ["more", "all", "no metadata", "broken metadata", "odd metadata"])
def test_a_spoilt_partial_file_never_spoils_the_file(server, tmp_path, spoil):
    url = begin(server, tmp_path)
    partial = beside(destination(url, tmp_path), ".partial")
    metadata = beside(partial, ".json")
    if spoil == "more":
        partial.write_bytes(CONTENT + b"more")
    elif spoil == "all":
        partial.write_bytes(CONTENT)
    elif spoil == "no metadata":
        metadata.unlink()
        partial.write_bytes(OTHER[:CUT])
    else:
        metadata.write_text('{"valid' if spoil == "broken metadata" else "[7]")
        partial.write_bytes(OTHER[:CUT])
    assert_fetched(url, tmp_path)


def test_a_server_that_claims_too_many_bytes_is_given_up(server, tmp_path):
    url = server.serve("/model.pth", CONTENT, always=Reply(longer=10))
    said = refusal(url, tmp_path, attempts=1)
    assert str(len(CONTENT)) in said
    assert str(len(CONTENT) + 10) in said
    refusal(url, tmp_path)
    assert not destination(url, tmp_path).exists()


def test_a_server_that_claims_too_few_bytes_is_caught_by_the_digest(server, tmp_path):
    url = server.serve("/model.pth", CONTENT, Reply(longer=-10))
    refusal(url, tmp_path, sha256=digest(CONTENT)[:8])
    assert contents(tmp_path) == {}
    assert_fetched(url, tmp_path, sha256=digest(CONTENT)[:8])


def unused_port():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return unused.getsockname()[1]


UNREACHABLE = {
    "404": lambda server: server.address + "/gone.pth",
    "500": lambda server: server.serve("/model.pth", CONTENT, always=Reply(status=500)),
    "refused": lambda _: f"http://127.0.0.1:{unused_port()}/model.pth",
    "": lambda _: "http://nothing.invalid/model.pth",
    "302": lambda server: server.serve(
        "/loop.pth", b"", always=Reply(status=302, location="/loop.pth")
    ),
    "file:": lambda server: server.serve(
        "/here.pth", b"", always=Reply(status=302, location=f"file://{__file__}")
    ),
}


@pytest.mark.parametrize("reason", UNREACHABLE)
def test_a_failure_names_url_reason_and_where_to_put_the_file(server, tmp_path, reason):
    url = UNREACHABLE[reason](server)
    said = refusal(url, tmp_path)
    path = destination(url, tmp_path)
    assert url in said
    assert str(path) in said.replace(url, "")
    assert reason in said.replace(url, "").replace(str(path), "").lower()
    assert not path.exists()


@pytest.mark.parametrize("stall", [-1, 0, CUT])
def test_a_server_that_falls_silent_is_given_up(server, tmp_path, monkeypatch, stall):
    plain = socket.socket.settimeout
    # Whatever the limit is, if there is one: a test cannot wait for it.
    monkeypatch.setattr(
        socket.socket,
        "settimeout",
        lambda self, seconds: plain(self, seconds if seconds is None else min(seconds, 0.3)),
    )
    url = server.serve("/model.pth", CONTENT, Reply(stall=stall))
    partial = beside(destination(url, tmp_path), ".partial")
    said = refusal(url, tmp_path, attempts=1)
    assert url in said
    assert str(destination(url, tmp_path)) in said
    assert "timed out" in said
    # What stood in a buffer may be lost.
    got = partial.read_bytes() if partial.exists() else b""
    assert CONTENT[: max(stall, 0)].startswith(got)
    assert_fetched(url, tmp_path)
    assert server.ranges() == [None, f"bytes={len(got)}-" if got else None]


@pytest.mark.parametrize("scheme", ["ftp://127.0.0.1", "file://", "data:,"])
def test_only_http_is_fetched(tmp_path, scheme):
    with pytest.raises(ValueError, match="http") as caught:
        fetch(f"{scheme}/model.pth", tmp_path / "folder")
    assert not isinstance(caught.value, WeightsError)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1/a\nb.pth", "http://a\n.invalid/b.pth"])
def test_a_url_of_two_lines_is_refused_in_one(tmp_path, url):
    with pytest.raises((ValueError, WeightsError)) as caught:
        fetch(url, tmp_path, attempts=1)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("tail", ["", "?version=1", "?version=2/3"])
@pytest.mark.parametrize("folder", ["a", "b"])
def test_a_name_has_the_digest_of_its_url(tmp_path, folder, tail):
    url = f"https://example.org/{folder}/model.pth{tail}"
    assert destination(url, tmp_path) == tmp_path / f"{digest(url.encode())[:8]}-model.pth"


@pytest.mark.parametrize("tail", ["/..", "/../..", "/a/..%2f..%2fb", "/a?../../b", "/a#/../../b"])
def test_no_name_leaves_the_folder(tmp_path, tail):
    path = destination("https://example.org" + tail, tmp_path)
    assert path.resolve().parent == tmp_path.resolve()


def test_urls_that_end_alike_share_no_file(server, tmp_path):
    pages = {"/a/m.pth": b"a", "/b/m.pth": b"b", "/a/m.pth?v=1": b"c", "/a/m.pth?v=2": b"d"}
    paths = [fetch(server.serve(*page), tmp_path) for page in pages.items()]
    assert [path.read_bytes() for path in paths] == list(pages.values())
    assert len(set(paths)) == 4


@pytest.fixture
def locked(server, tmp_path):
    """A folder that cannot be written to, outside root's own, which others cannot enter."""
    # What is imported late must be there before the right to read it is gone.
    fetch(server.serve("/early.pth", CONTENT), tmp_path)
    refusal(server.address + "/gone.pth", tmp_path)
    server.requests.clear()
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    with unprivileged(), pytest.raises(PermissionError):
        (folder / "file").touch()
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def put(folder, name, content):
    folder.chmod(0o755)
    (folder / name).write_bytes(content)
    folder.chmod(0o555)


def test_a_file_in_a_read_only_folder_is_used_and_checked(server, locked):
    url = server.serve("/model.pth", CONTENT)
    path = destination(url, locked)
    put(locked, path.name, CONTENT)
    with unprivileged():
        assert fetch(url, locked) == fetch(url, locked, sha256=digest(CONTENT)) == path
        assert_refused_and_kept(server, path, url, digest(OTHER), sha256=digest(OTHER))
    assert [file.name for file in locked.iterdir()] == [path.name]
    put(locked, f"{path.name}.sha256", f"{digest(CONTENT)}  {path.name}\n".encode())
    with unprivileged():
        assert fetch(url, locked) == path
    put(locked, path.name, OTHER)
    with unprivileged():
        assert_refused_and_kept(server, path, url, digest(CONTENT), digest(OTHER))
    assert not server.requests


@pytest.mark.parametrize("below", ["", "new", "new/newer"])
def test_a_folder_that_cannot_be_written_is_named(server, locked, below):
    folder = locked / below
    url = server.serve("/model.pth", CONTENT)
    with unprivileged():
        assert str(folder) in refusal(url, folder)


@pytest.mark.parametrize("below", ["", "new"])
def test_a_folder_that_is_a_file_is_named(server, tmp_path, below):
    (tmp_path / "file").write_bytes(OTHER)
    folder = tmp_path / "file" / below
    assert str(folder) in refusal(server.serve("/model.pth", CONTENT), folder)
    assert contents(tmp_path) == {"file": OTHER}


def test_two_processes_download_once(server, tmp_path):
    reply = Reply(stall=CUT)
    url = server.serve("/model.pth", CONTENT, reply)
    path = destination(url, tmp_path)
    with fetching(url, tmp_path, 2) as processes:
        assert server.stalled.wait(20)
        time.sleep(0.5)
        assert [process.poll() for process in processes] == [None, None]
        assert not path.exists()
        reply.resume.set()
        printed = [process.communicate(timeout=20)[0] for process in processes]
    assert printed == [f"{path}\n"] * 2
    assert [process.returncode for process in processes] == [0, 0]
    assert server.ranges() == [None]
    assert path.read_bytes() == CONTENT
    assert_fetched(url, tmp_path)


def test_what_a_killed_process_had_is_not_fetched_again(server, tmp_path):
    content = random.Random(3).randbytes(8 << 20)
    url = server.serve("/model.pth", content, Reply(stall=6 << 20))
    path = destination(url, tmp_path)
    partial = beside(path, ".partial")
    with fetching(url, tmp_path, 1) as (process,):
        assert server.stalled.wait(20)
        deadline = time.monotonic() + 20
        while not partial.exists() or partial.stat().st_size == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not path.exists()
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    size = partial.stat().st_size
    assert partial.read_bytes() == content[:size]
    assert not path.exists()
    assert_fetched(url, tmp_path, content)
    assert server.ranges() == [None, f"bytes={size}-"]
    assert server.requests[-1].headers["If-Range"] == '"first"'
