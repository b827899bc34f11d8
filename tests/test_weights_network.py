"""What `fetch` makes of networks that lie and folders that are shared."""

import os
from urllib.error import HTTPError
from urllib.request import Request

import pytest
from filelock import FileLock
from http_suite import CONTENT, OTHER, Reply, assert_fetched, contents, digest, refusal

from model.weights import download
from model.weights.catalogue import CATALOGUE, digest_of
from model.weights.download import destination, fetch


@pytest.mark.parametrize(
    "headers",
    [{"Content-Type": "text/html; charset=utf-8"}, {"Content-Encoding": "gzip"}],
    ids=["a login page", "packed"],
)
def test_what_stands_between_is_not_recorded_as_the_file(server, tmp_path, headers):
    url = server.serve("/model.pth", OTHER, headers=headers)
    said = refusal(url, tmp_path, attempts=1)
    assert "the server answers 200 with" in said
    assert str(destination(url, tmp_path)) in said
    assert contents(tmp_path) == {}
    server.serve("/model.pth", CONTENT)
    assert_fetched(url, tmp_path)


@pytest.mark.parametrize("status", [202, 204])
def test_an_answer_without_the_file_is_not_the_file(server, tmp_path, status):
    url = server.serve("/model.pth", CONTENT, Reply(status=status))
    assert f"the server answers {status}" in refusal(url, tmp_path, attempts=1)
    assert_fetched(url, tmp_path)


def test_a_redirection_leaves_https_for_nothing_less():
    handler = download._Redirects()
    asked = Request("https://example.org/model.pth")
    with pytest.raises(HTTPError, match="leads to http://"):
        handler.redirect_request(asked, None, 302, "Found", {}, "http://example.org/model.pth")
    for start, end in (("https", "https"), ("http", "https"), ("http", "http")):
        asked = Request(f"{start}://example.org/model.pth")
        address = f"{end}://example.net/model.pth"
        assert handler.redirect_request(asked, None, 302, "Found", {}, address).full_url == address


def test_a_file_that_is_there_waits_for_no_lock(server, tmp_path):
    url = server.serve("/model.pth", CONTENT)
    path = fetch(url, tmp_path)
    with FileLock(f"{path}.lock"):
        assert fetch(url, tmp_path) == path


def test_a_received_file_of_another_digest_is_not_said_to_lie_there(server, tmp_path):
    url = server.serve("/model.pth", CONTENT)
    said = refusal(url, tmp_path, sha256=digest(OTHER))
    assert f"what was received for {destination(url, tmp_path)}" in said
    assert "delete" not in said


def test_a_record_that_cannot_be_read_is_refused_in_a_line(server, tmp_path):
    url = server.serve("/model.pth", CONTENT)
    path = fetch(url, tmp_path)
    record = path.with_name(f"{path.name}.sha256")
    record.unlink()
    record.mkdir()
    assert str(tmp_path) in refusal(url, tmp_path)


@pytest.mark.parametrize(
    "tail", ["a%0Ab.pth", "a%00b.pth", "%F0%9F%98%80" * 90 + ".pth", "x" * 300 + ".pth", "a b.pth"]
)
def test_any_address_has_a_name_that_is_one(server, tmp_path, tail):
    if " " in tail:
        with pytest.raises(ValueError, match="http or https address of a file"):
            destination(f"{server.address}/{tail}", tmp_path)
        return
    url = server.serve(f"/{tail}", CONTENT)
    name = destination(url, tmp_path).name
    assert name.isprintable()
    assert len(os.fsencode(f"{name}.partial.json")) < 255
    assert_fetched(url, tmp_path)


def test_digests_are_taken_from_the_names_of_those_who_put_them_there():
    digests = {url: digest_of(url) for names in CATALOGUE.values() for url in names.values()}
    for url, found in digests.items():
        by_hash = url.startswith(("https://download.pytorch.org", "https://download.openmmlab.com"))
        assert (found is not None) == by_hash, url
        assert found is None or url.endswith(f"-{found}.pth")
