"""What a server says in the head of an answer, sense and nonsense alike."""

import base64
import hashlib
import time
from email.utils import formatdate

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamalab.catalog.catalog import FileFacts
from llamalab.downloads.response import Head

numbers = st.integers(0, 10**17)
texts = st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=60)


def head(status=206, /, **headers):
    given = {name.replace("_", "-"): text for name, text in headers.items()}
    return Head(httpx.Response(status, headers={k: v.encode("latin-1") for k, v in given.items()}))


@given(numbers, numbers, numbers)
def test_a_range_that_makes_sense_is_read(start, length, behind):
    stop, total = start + length, start + length + 1 + behind
    answer = head(Content_Range=f"bytes {start}-{stop}/{total}")
    assert (answer.first_byte, answer.total_size) == (start, total)
    assert head(Content_Range=f"bytes {start}-{stop}/*").first_byte == start
    assert head(416, Content_Range=f"bytes */{total}").total_size == total


@pytest.mark.parametrize(
    "text",
    ["", "bytes", "bytes 5-4/9", "bytes 0-9/9", "bytes -1-5/9", "bytes */9", "items 0-1/9"]
    + ["bytes 0-1/9 ", "bytes 0-1/9, 3-4/9", f"bytes 0-{'9' * 5000}/*", "bytes ²-³/9"],
)
def test_a_range_that_makes_none(text):
    assert head(Content_Range=text).first_byte is None


@given(st.sampled_from(["Content-Range", "Content-Length", "Retry-After", "ETag", "Digest"]), texts)
def test_any_text_is_read_or_passed_over(name, text):
    for status in (200, 206, 416, 503):
        answer = head(status, **{name: text})
        for value in (answer.first_byte, answer.total_size):
            assert value is None or value >= 0
        wait, etag = answer.retry_after, answer.validator
        assert wait is None or 0 <= wait < float("inf")
        assert etag is None or etag.encode("ascii")  # it goes back to the server in a header
        assert answer.promise.sha256 is None or name == "Digest"


@given(st.integers(0, 10**6))
def test_retry_after_is_a_number_or_a_date(seconds):
    assert head(503, Retry_After=str(seconds)).retry_after == seconds
    date = formatdate(time.time() + seconds, usegmt=True)
    assert abs(head(503, Retry_After=date).retry_after - seconds) < 5


def test_a_weak_etag_names_no_version():
    assert head(ETag='"1"', Last_Modified="today").validator == '"1"'
    assert head(ETag='W/"1"', Last_Modified="today").validator == "today"
    assert head(ETag='W/"1"').validator is None


@given(st.binary(max_size=100))
def test_promised_digests_are_what_hashlib_says(content):
    md5, sha256 = hashlib.md5(content), hashlib.sha256(content)
    b64 = {h.name: base64.b64encode(h.digest()).decode() for h in (md5, sha256)}
    both = FileFacts(None, md5.hexdigest(), sha256.hexdigest())
    for heads in (
        {"Repr_Digest": f"sha-256=:{b64['sha256']}:, md5=:{b64['md5']}:"},
        {"Digest": f"SHA-256={b64['sha256']},MD5={b64['md5']}"},
        {"Content_MD5": b64["md5"], "X_Linked_ETag": f'"{sha256.hexdigest()}"'},
    ):
        assert head(200, **heads).promise == both
    assert head(206, Content_MD5=b64["md5"]).promise.md5 is None  # of the part
    linked = head(200, X_Linked_Size="7", X_Linked_ETag='"d41d8cd98f00b204e9800998ecf8427e"')
    assert linked.promise == FileFacts(7)  # a git hash or the like is no sha256
