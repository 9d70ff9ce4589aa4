"""Servers at fault, over loopback HTTP: `llamalab download` ends in the right bytes or one error."""

import hashlib
import os
import random
import signal
import time

import pytest

import served
from llamalab.catalog.catalog import FileFacts, Part
from llamalab.cli import main
from llamalab.downloads import file_download, transfer
from llamalab.errors import LabError
from llamalab.files import locked
from llamalab_course.file_server import Fault, serve_files
from served import BIG, SHA256, WEIGHTS, Acts, accepted, archive, child, lay_out, whole

tables, loop = pytest.fixture(served.tables), pytest.fixture(served.loop)


def part(**headers):
    """A part of the file whose head tells other things than the truth."""
    names = {name.replace("_", "-"): text for name, text in headers.items()}
    return Fault(only_parts=True, times=1, headers=names)


CUT, RIGHT = Fault(cut_after=200_000, times=1), ""
SIZE, TOKENIZER = len(WEIGHTS), "tiny/tokenizer.model"

# name: (the faults of successive requests for the weights, "" for right bytes or the error's words)
CASES = {
    "cut once": ([CUT], RIGHT),
    "cut before the first byte": ([Fault(cut_after=0)] * 3, RIGHT),
    "cut before the last byte": ([Fault(cut_after=SIZE - 1, times=1)], RIGHT),
    "every answer cut": ([Fault(cut_after=30_000)] * 40, RIGHT),
    "reset by the other side": ([Fault(cut_after=200_000, reset=True)] * 2, RIGHT),
    "a stall": ([Fault(stall_after=100_000, times=1)], RIGHT),
    "a stall before the first byte": ([Fault(stall_after=0, times=1)], RIGHT),
    "200 to a range": ([CUT, Fault(ignore_range=True)], RIGHT),
    "206 of another range": ([CUT, Fault(wrong_range=True)], RIGHT),
    "206 of another size": (
        [CUT, part(Content_Range=f"bytes 200000-{SIZE - 1}/{SIZE + 7}")],
        RIGHT,
    ),
    "206 that ends before it starts": ([CUT, part(Content_Range="bytes 9-5/3")], RIGHT),
    "206 of a negative range": ([CUT, part(Content_Range=f"bytes -5-{SIZE}/{SIZE}")], RIGHT),
    "206 in several parts": (
        [CUT, part(Content_Range="", Content_Type="multipart/byteranges; boundary=x")],
        RIGHT,
    ),
    "416 in the middle": ([CUT, Fault(status=416, only_parts=True)], RIGHT),
    "429 and Retry-After": ([Fault(status=429, retry_after="0")] * 2, RIGHT),
    "503 until a date": ([Fault(status=503, retry_after="Mon, 01 Jan 2024 00:00:00 GMT")], RIGHT),
    "503 and nonsense": ([Fault(status=503, retry_after="soon")] * 2, RIGHT),
    "500": ([Fault(status=500)], RIGHT),
    "408": ([Fault(status=408)], RIGHT),
    "503 for ever": ([Fault(status=503, retry_after="0")] * 99, "attempts in a row"),
    "one connection at a time": ([Fault(at_once=1, retry_after="0")] * 99, RIGHT),
    "another version each time": ([Fault(cut_after=200_000, new_etag=True)] * 2, RIGHT),
    "parts of another version": (
        [CUT, Fault(cut_after=50_000, new_etag=True, ignore_if_range=True)],
        RIGHT,
    ),
    "another version for ever": (
        [Fault(cut_after=200_000, new_etag=True)] * 99,
        "attempts in a row",
    ),
    "a weak ETag": ([Fault(cut_after=200_000, headers={"ETag": 'W/"1"'})] * 2, RIGHT),
    "no ETag": ([Fault(cut_after=200_000, headers={"ETag": ""})] * 2, RIGHT),
    "an ETag of odd letters": (
        [Fault(cut_after=200_000, headers={"ETag": '"\xe4\xf6"'})] * 2,
        RIGHT,
    ),
    "no length": ([Fault(headers={"Content-Length": ""})], RIGHT),
    "no length, and cut": ([Fault(headers={"Content-Length": ""}, cut_after=200_000)], RIGHT),
    "too long a length": ([Fault(headers={"Content-Length": str(SIZE + 9)})] * 9, "are expected"),
    "too short a length": ([Fault(headers={"Content-Length": "90000"})] * 9, "are expected"),
    "a negative length": ([Fault(headers={"Content-Length": "-5"})], RIGHT),
    "chunks": ([Fault(chunked=True)], RIGHT),
    "chunks, and cut": ([Fault(chunked=True, cut_after=200_000)], RIGHT),
    "chunks, and more than the file": ([Fault(chunked=True, surplus=5000)], RIGHT),
    "rubbish after the file": ([Fault(surplus=5000)], RIGHT),
    "gzip": ([Fault(gzip=True)], RIGHT),
    "gzip, and cut": ([Fault(gzip=True, cut_after=200_000)], RIGHT),
    "gzip of parts": ([CUT, Fault(gzip=True)], RIGHT),
    "gzip in name only": ([Fault(headers={"Content-Encoding": "gzip"})] * 99, "attempts in a row"),
    "not HTTP": ([Fault(garbage=b"220 ready\r\n")], RIGHT),
    "not HTTP for ever": ([Fault(garbage=b"220 ready\r\n")] * 99, "attempts in a row"),
    "an endless head": ([Fault(headers={"X-Filler": "x" * 300_000})], RIGHT),
    "a redirect in circles": ([Fault(redirect="/" + BIG)] * 99, "cannot be fetched"),
    "a redirect to a file": ([Fault(redirect="file:///etc/passwd")] * 9, "cannot be fetched"),
    "a redirect to ftp": ([Fault(redirect="ftp://127.0.0.1/x")] * 9, "cannot be fetched"),
    "a redirect to nowhere": ([Fault(status=302)] * 9, "status 302"),
    "a redirect that is no address": ([Fault(redirect="http://[::1/")] * 99, "fetched"),
    "a flipped byte": ([Fault(flip_at=150_000)] * 99, "bytes changed on the way"),
    "a flipped byte once, and cut": ([Fault(flip_at=150_000, cut_after=200_000)], RIGHT),
    "a flipped first byte": ([Fault(flip_at=0)] * 99, "Not a PyTorch file"),
    "a web page": ([Fault(html=True)] * 99, "HTML page"),
    "a web page in the middle": ([CUT] + [Fault(html=True, only_parts=True)] * 99, "HTML page"),
    "an empty file": ([Fault(headers={"Content-Length": "0"}, cut_after=0)] * 9, "are expected"),
    "not found": ([Fault(status=404)] * 99, "was not found"),
    "gone": ([Fault(status=410)] * 99, "was not found"),
    "forbidden": ([Fault(status=403)] * 99, "HF_TOKEN"),
    "who are you": ([Fault(status=401)] * 99, "HF_TOKEN"),
    "no content": ([Fault(status=204)] * 99, "status 204"),
    "not modified": ([Fault(status=304)] * 99, "status 304"),
    "gzip that explodes": ([Fault(gzip=True, headers={"Content-Encoding": "gzip, gzip"})], RIGHT),
    "an encoding that nobody knows": (
        [Fault(headers={"Content-Encoding": "llama"}, flip_at=9000)] * 99,
        "bytes changed",
    ),
    "payment required": ([Fault(status=402)] * 99, "status 402"),
    "another file's sha256": (
        [Fault(headers={"X-Linked-ETag": f'"{"0" * 64}"'})] * 99,
        "the sha256 0000",
    ),
    "another file's md5": (
        [Fault(headers={"Content-MD5": "AAAAAAAAAAAAAAAAAAAAAA=="})] * 99,
        "the md5 0000",
    ),
    "another file's size": ([Fault(headers={"X-Linked-Size": "7"})] * 99, "has 7 bytes"),
    "nonsense for digests": (
        [Fault(headers={"Content-MD5": "?", "Repr-Digest": "sha-256=:AAA:", "Digest": "x,=,"})],
        RIGHT,
    ),
}


@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("acts, words", CASES.values(), ids=CASES.keys())
def test_right_bytes_or_one_clear_error(
    tables, tmp_path, monkeypatch, capsys, acts, words, connections
):
    assert len(CASES) >= 25
    monkeypatch.setattr(file_download, "BACK_OFF_SECONDS", 0.001)
    monkeypatch.setattr(file_download, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(transfer, "PIECE", 1 << 15)
    folder, models = lay_out(tmp_path / "served" / "tiny"), tmp_path / "models"
    acts = [Fault(**vars(act)) if act else None for act in acts]  # they count how often they act
    script = Acts(BIG, acts)
    with serve_files(folder.parent, script) as url:
        options = ["--models-dir", str(models), "--source", url, "--connections", str(connections)]
        code = main(["download", "tiny", *options])
    output = capsys.readouterr()
    if words:
        assert code == 1 and words in output.err and "Traceback" not in output.err
        assert "consolidated.00.pth" not in accepted(models)
    else:
        assert code == 0 and output.out == f"{models / 'tiny'}\n", output.err
        assert whole(models)
    # The faults were really met: the first one always, and what follows a cut as well.
    met = len(acts) - len(script.acts)
    assert met >= 1 + (connections == 1 and len(acts) > 1 and bool(acts[0].cut_after))


@pytest.mark.parametrize("connections", [1, 4])
def test_several_connections_each_bring_their_part(loop, monkeypatch, connections):
    monkeypatch.setattr(transfer, "PIECE", 1 << 15)
    transfer.download("tiny", loop.models, [loop.url], connections=connections)
    assert whole(loop.models)
    asked = [r.range for r in loop.log if r.path == BIG]
    if connections == 1:
        assert asked == [""]
        return
    pieces = [f"bytes={n}-{n + (1 << 15) - 1}" for n in range(1 << 15, SIZE - (1 << 15), 1 << 15)]
    last = (1 << 15) * (SIZE >> 15)
    assert sorted(asked) == sorted(["", *pieces, f"bytes={last}-"])


def test_a_version_that_changes_under_several_connections(loop, tables, monkeypatch):
    """Nothing published: only the validators keep two versions apart."""
    tables["tiny"].files["S/consolidated.00.pth"] = FileFacts()
    monkeypatch.setattr(transfer, "PIECE", 1 << 15)
    other = archive(400_000)
    place, seen = loop.served.parent / BIG, []

    class Changing(dict):
        def get(self, name, default):
            seen.append(name)
            if seen.count(BIG) == 4:
                fresh = place.with_name("fresh")
                fresh.write_bytes(other)
                os.replace(fresh, place)
            return default

    with serve_files(loop.served.parent, Changing()) as url:
        transfer.download("tiny", loop.models, [url])
    assert (loop.models / BIG).read_bytes() == other


@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("206", "200", "416"))])
def test_with_nothing_published_the_heads_of_answers_must_do(
    loop, tables, monkeypatch, name, connections
):
    monkeypatch.setattr(transfer, "PIECE", 1 << 15)
    tables["tiny"].files["S/consolidated.00.pth"] = FileFacts()
    acts = [Fault(**vars(act)) for act in CASES[name][0]]
    with serve_files(loop.served.parent, Acts(BIG, acts)) as url:
        transfer.download("tiny", loop.models, [url], connections=connections)
    assert whole(loop.models)


@pytest.mark.parametrize("acts", [1, 3])
def test_what_only_the_server_promises_counts(loop, tables, acts):
    """Nothing is published of the file, and the Hub's header tells the flipped byte."""
    tables["tiny"].files["S/consolidated.00.pth"] = FileFacts()
    head = {"X-Linked-ETag": f'"{SHA256}"'}
    cut = {"cut_after": 200_000} if acts == 3 else {}
    loop.faults[BIG] = Fault(flip_at=150_000, headers=head, **cut)
    with pytest.raises(LabError, match=f"Expected sha256 {SHA256}"):
        loop.download()
    assert accepted(loop.models) == {"checklist.chk"}
    loop.faults[BIG] = Fault(headers=head, **cut)
    loop.download()
    assert whole(loop.models)


# --- killed, interrupted, two at once ----------------------------------------------------------


def served_in(tmp_path, size):
    content = archive(size)
    lay_out(tmp_path / "served", {"tiny/w.pth": content})
    return content, hashlib.sha256(content).hexdigest()


def lost_by_a_kill(folder, models, sha256, size, point, rate, connections):
    """Kill a download once `point` bytes were sent, end it, and return the bytes sent in vain."""
    log, options = [], (models, "w.pth", "--connections", connections)
    with serve_files(folder, log=log, rate=rate / connections) as url:
        process = child(sha256, url, *options)
        while process.poll() is None and sum(r.sent for r in log) < point:
            time.sleep(0.002)
        process.kill()
        process.communicate(timeout=30)
    with serve_files(folder, log=log) as again:
        # The same address to the sidecar, which is on another port now.
        sidecar = models / "tiny" / "w.pth.partial.json"
        if sidecar.exists():
            sidecar.write_text(sidecar.read_text().replace(url, again))
        process = child(sha256, again, *options)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    assert hashlib.sha256((models / "tiny" / "w.pth").read_bytes()).hexdigest() == sha256
    return sum(r.sent for r in log) - size


@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.slow
def test_a_kill_loses_at_most_the_last_second(tmp_path, connections):
    content, sha256 = served_in(tmp_path, 24_000_000)
    place = random.Random(7)
    for number in range(2):
        point = place.randrange(len(content))
        models = tmp_path / f"models-{number}"
        arguments = (tmp_path / "served", models, sha256, len(content), point)
        assert lost_by_a_kill(*arguments, 12_000_000, connections) <= 12_000_000


@pytest.mark.heavy
@pytest.mark.parametrize("connections", [1, 4])
def test_twenty_kills_of_a_large_download(tmp_path, connections, capsys):
    """By bytes, not by the clock: what a killed process had and lost is under a second's worth."""
    content, sha256 = served_in(tmp_path, 200_000_000)
    place, rate, losses = random.Random(20), 40_000_000, []
    for number in range(20):
        point, models = place.randrange(len(content)), tmp_path / f"models-{number}"
        arguments = (tmp_path / "served", models, sha256, len(content), point)
        losses.append(lost_by_a_kill(*arguments, rate, connections))
        (models / "tiny" / "w.pth").unlink()
    with capsys.disabled():
        print(f"\n{connections} connections at {rate:,} bytes/s, lost: {sorted(losses)}")
    assert max(losses) <= rate


def test_interrupted_it_says_how_to_go_on(tmp_path):
    content, sha256 = served_in(tmp_path, 300_000)
    log, fault = [], {"tiny/w.pth": Fault(stall_after=200_000)}
    models = tmp_path / "models"
    with serve_files(tmp_path / "served", fault, log) as url:
        process = child(sha256, url, models, "w.pth")
        partial = models / "tiny" / "w.pth.partial"
        while process.poll() is None and not (
            partial.exists() and partial.stat().st_size == 200_000
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 130 and b"Traceback" not in errors
        assert b"200,000 bytes of 'w.pth' are kept" in errors and b"same command" in errors
        fault.clear()
        process = child(sha256, url, models, "w.pth")
        process.communicate(timeout=60)
    assert (models / "tiny" / "w.pth").read_bytes() == content
    assert [(r.range, r.status) for r in log if r.status != 404] == [
        ("", 200),
        ("bytes=200000-", 206),
    ]


def test_two_processes_on_one_file(tmp_path):
    content, sha256 = served_in(tmp_path, 6_000_000)
    log, models = [], tmp_path / "models"
    with serve_files(tmp_path / "served", log=log) as url:
        with locked(models / "tiny"):  # so that the one is surely at work when the other comes
            both = [child(sha256, url, models, "w.pth", "--connections", 1) for _ in range(2)]
            for process in both:
                assert b"Another process is at work" in process.stderr.readline()
            assert log == []
        for process in both:
            process.communicate(timeout=60)
    assert [process.returncode for process in both] == [0, 0]
    assert (models / "tiny" / "w.pth").read_bytes() == content
    # The second one found the file in its place: not a byte was sent twice.
    assert sum(r.sent for r in log) == len(content)
    assert sorted(p.name for p in (models / "tiny").iterdir()) == ["w.pth"]


# --- chance ------------------------------------------------------------------------------------


class Chance(dict):
    """A server that is at fault at random, in any of the ways there are, several at a time."""

    def __init__(self, seed, size):
        super().__init__()
        self.chance, self.size, self.left = random.Random(seed), size, 12

    def get(self, name, default):
        chance = self.chance
        if self.left == 0 or chance.random() < 0.2:
            return default
        self.left -= 1
        place = chance.randrange(self.size + 1)
        wrong = [
            {"cut_after": place},
            {"cut_after": place, "reset": True},
            {"stall_after": place},
            {"flip_at": place},
            {"html": True},
            {"gzip": True},
            {"chunked": True},
            {"surplus": 1000},
            {"garbage": b"\0\1\2"},
            {"ignore_range": True},
            {"ignore_if_range": True, "new_etag": True},
            {"wrong_range": True},
            {"status": chance.choice([403, 404, 416, 429, 500, 503]), "retry_after": "0"},
            {"redirect": f"/{name}"},
            {"new_etag": True},
            {"at_once": 1, "retry_after": "0"},
            {"headers": {"Content-Length": str(place)}},
            {"headers": {"Content-Range": f"bytes {place}-{self.size}/{self.size}"}},
            {"headers": {"ETag": chance.choice(["", 'W/"1"', '"same"'])}},
            {"headers": {"Accept-Ranges": ""}},
        ]
        fault = Fault()
        for choice in chance.sample(wrong, chance.choice([1, 1, 1, 2, 3])):
            vars(fault).update(choice)
        return fault


def soak(tables, folder, monkeypatch, count, seed):
    """Download over and over; return how often the bytes came, and how often an error instead."""
    monkeypatch.setattr(file_download, "BACK_OFF_SECONDS", 0.0005)
    monkeypatch.setattr(file_download, "STALL_SECONDS", 0.1)
    monkeypatch.setattr(transfer, "PIECE", 1 << 15)
    lay_out(folder / "served" / "tiny")
    chance, ends = random.Random(seed), {"bytes": 0, "error": 0}
    for number in range(count):
        known = chance.choice([{"sha256": SHA256}, {"sha256": SHA256, "size": SIZE}])
        files = {"S/consolidated.00.pth": FileFacts(**known)}
        tables["tiny"] = Part("tiny", "base", files, vocab=8)
        models, connections = folder / f"models-{number}", chance.choice([1, 2, 4])
        with serve_files(folder / "served", Chance(seed * 1000 + number, SIZE)) as url:
            for _attempt in range(2):  # the second goes on from what the first has left
                try:
                    transfer.download("tiny", models, [url], connections=connections)
                    ends["bytes"] += 1
                    break
                except LabError:
                    ends["error"] += 1
                    assert accepted(models) == set()
        if accepted(models):
            assert (models / BIG).read_bytes() == WEIGHTS, f"download {number}"
    return ends


def test_a_little_chance(tables, tmp_path, monkeypatch):
    assert soak(tables, tmp_path, monkeypatch, 15, 3)["bytes"] > 5


@pytest.mark.heavy
def test_a_soak_of_two_hundred_downloads(tables, tmp_path, monkeypatch, capsys):
    ends = soak(tables, tmp_path, monkeypatch, 200, 1)
    with capsys.disabled():
        print(f"\n200 downloads with random faults: {ends}")
    assert ends["bytes"] > 100 and ends["error"] > 0


def test_negative_control_the_soak_can_fail(tables, tmp_path, monkeypatch):
    """With the judgement taken away the same soak accepts wrong bytes, and says so."""
    honest = file_download.compare_file

    def blind(path, name, facts, *arguments):
        return honest(path, name, FileFacts())

    monkeypatch.setattr(file_download, "compare_file", blind)
    with pytest.raises(AssertionError, match="download"):
        soak(tables, tmp_path, monkeypatch, 60, 5)
