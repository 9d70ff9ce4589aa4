"""The file server against plain clients: honest HTTP first, then each way of misbehaving."""

import http.client
import time
import urllib.error
import urllib.request

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamalab_course.file_server import PAGE, Fault, serve_files

CONTENT = bytes(range(256)) * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "part").mkdir()
    (folder / "part" / "file.bin").write_bytes(CONTENT)
    (folder.parent / "secret").write_text("not served")
    return folder


@pytest.fixture(scope="module")
def url(folder):
    with serve_files(folder) as url:
        yield url + "/part/file.bin"


def get(url, **headers):
    """Return (status, headers, body) by the standard library, errors of status included."""
    request = urllib.request.Request(
        url, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def test_whole_file_listens_on_loopback_only(url):
    status, headers, body = get(url)
    assert (status, body) == (200, CONTENT)
    assert headers["Content-Length"] == str(len(CONTENT))
    assert url.startswith("http://127.0.0.1:")


@settings(deadline=None)
@given(st.integers(0, len(CONTENT) - 1), st.integers(0, 2 * len(CONTENT)))
def test_a_range_is_the_slice(url, start, length):
    status, headers, body = get(url, Range=f"bytes={start}-{start + length}")
    assert (status, body) == (206, CONTENT[start : start + length + 1])
    stop = start + len(body) - 1
    assert headers["Content-Range"] == f"bytes {start}-{stop}/{len(CONTENT)}"


def test_open_and_last_ranges(url):
    assert get(url, Range="bytes=1000-")[2] == CONTENT[1000:]
    assert get(url, Range="bytes=-10")[2] == CONTENT[-10:]


def test_a_range_past_the_end_is_416(url):
    status, headers, body = get(url, Range=f"bytes={len(CONTENT)}-")
    assert (status, body, headers["Content-Range"]) == (416, b"", f"bytes */{len(CONTENT)}")


def test_if_range_gives_the_part_only_of_the_same_version(url):
    etag = get(url)[1]["ETag"]
    assert get(url, Range="bytes=7-", If_Range=etag)[0] == 206
    assert get(url, Range="bytes=7-", If_Range='"another"')[::2] == (200, CONTENT)


@pytest.mark.parametrize(
    "path", ["/nothing", "/../secret", "/%2e%2e/secret", "//etc/passwd", "/part"]
)
def test_nothing_outside_the_directory(folder, path):
    with serve_files(folder) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
        connection.request("GET", path)
        assert connection.getresponse().status == 404
        connection.close()


@pytest.mark.parametrize(
    "fault, status, body",
    [
        (Fault(html=True), 200, PAGE),
        (Fault(ignore_range=True), 200, CONTENT),
        (Fault(wrong_range=True), 206, CONTENT[50:]),
        (Fault(status=503, retry_after="7"), 503, b""),
        (Fault(flip_at=100), 206, bytes([CONTENT[100] ^ 1]) + CONTENT[101:]),
    ],
)
def test_faults(folder, fault, status, body):
    with serve_files(folder, {"part/file.bin": fault}) as url:
        answer = get(url + "/part/file.bin", Range="bytes=100-")
    assert answer[::2] == (status, body)
    assert answer[1]["Retry-After"] == (fault.retry_after or None)


def test_a_cut_after_some_bytes_once(folder):
    log = []
    with serve_files(folder, {"part/file.bin": Fault(cut_after=300, times=1)}, log) as url:
        with pytest.raises(http.client.IncompleteRead) as cut:
            get(url + "/part/file.bin")
        assert cut.value.partial == CONTENT[:300]
        assert get(url + "/part/file.bin")[2] == CONTENT
    assert [(r.status, r.sent) for r in log] == [(200, 300), (200, len(CONTENT))]


def test_a_stall_sends_nothing_more(folder):
    with serve_files(folder, {"part/file.bin": Fault(stall_after=300)}) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=2)
        connection.request("GET", "/part/file.bin")
        answer = connection.getresponse()
        assert answer.read(300) == CONTENT[:300]
        with pytest.raises(TimeoutError):
            answer.read(1)
        connection.close()


def test_each_answer_may_claim_a_new_version(folder):
    with serve_files(folder, {"part/file.bin": Fault(new_etag=True)}) as url:
        etags = {get(url + "/part/file.bin")[1]["ETag"] for _ in range(3)}
    assert len(etags) == 3


def test_gzip_and_chunks_are_what_a_plain_client_reads(folder):
    import gzip

    faults = {"part/file.bin": Fault(gzip=True)}
    with serve_files(folder, faults) as url:
        _, headers, body = get(url + "/part/file.bin")
        assert headers["Content-Encoding"] == "gzip" and gzip.decompress(body) == CONTENT
        faults["part/file.bin"] = Fault(chunked=True, flip_at=3)
        _, headers, body = get(url + "/part/file.bin")
    assert headers["Content-Length"] is None and body == CONTENT[:3] + b"\2" + CONTENT[4:]


def test_other_heads_than_the_truth(folder):
    head = {"Content-Length": "", "ETag": 'W/"x"', "X-Linked-Size": "7"}
    with serve_files(folder, {"part/file.bin": Fault(headers=head, surplus=5)}) as url:
        _, headers, body = get(url + "/part/file.bin")
    assert body == CONTENT + b"?????" and headers["Content-Length"] is None
    assert (headers["ETag"], headers["X-Linked-Size"]) == ('W/"x"', "7")


def test_a_length_that_is_promised_and_not_kept(folder):
    head = {"Content-Length": str(len(CONTENT) + 9)}
    with serve_files(folder, {"part/file.bin": Fault(headers=head)}) as url:
        with pytest.raises(http.client.IncompleteRead):
            get(url + "/part/file.bin")


def test_a_reset_and_what_is_not_http(folder):
    faults = {"part/file.bin": Fault(cut_after=300, reset=True)}
    with serve_files(folder, faults) as url:
        with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
            get(url + "/part/file.bin")
        faults["part/file.bin"] = Fault(garbage=b"hello\r\n\r\n")
        with pytest.raises(http.client.BadStatusLine):
            get(url + "/part/file.bin")


def test_faults_of_parts_and_of_crowds(folder):
    with serve_files(folder, {"part/file.bin": Fault(status=500, only_parts=True)}) as url:
        assert get(url + "/part/file.bin")[0] == 200
        assert get(url + "/part/file.bin", Range="bytes=0-")[0] == 500
    with serve_files(folder, {"part/file.bin": Fault(at_once=0)}) as url:
        assert get(url + "/part/file.bin")[0] == 503


def test_a_rate_is_kept_by_each_connection(folder):
    """The server's own log against the clock: never more than the rate, plus one block."""
    log, rate = [], 20_000
    with serve_files(folder, log=log, rate=rate) as url:
        start = time.monotonic()
        get(url + "/part/file.bin")
        assert log[0].sent <= rate * (time.monotonic() - start) + rate / 50


def test_the_log_says_what_was_asked(folder):
    log = []
    with serve_files(folder, log=log) as url:
        get(url + "/part/file.bin", Range="bytes=5-9", Authorization="Bearer x")
    assert [(r.method, r.path, r.range, r.status, r.sent, r.with_credentials) for r in log] == [
        ("GET", "part/file.bin", "bytes=5-9", 206, 5, True)
    ]
