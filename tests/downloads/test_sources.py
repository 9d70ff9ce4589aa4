"""Where files come from: addresses, directories and the Hub, each with what is secret of it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections import namedtuple

import pytest

import served
from llamalab.catalog.catalog import FileFacts
from llamalab.downloads import sources, transfer
from llamalab.errors import LabError, NotFound, UsageError
from llamalab_course.file_server import Fault, serve_files
from served import BIG, SHA256, WEIGHTS, Acts, accepted, child, lay_out, whole

tables, loop = pytest.fixture(served.tables), pytest.fixture(served.loop)


def test_a_query_and_a_password_go_along_and_are_not_shown(loop, tmp_path):
    log, acts = [], [Fault(cut_after=1000), *[Fault(status=503, retry_after="0")] * 9]
    with serve_files(loop.served.parent, Acts(BIG, acts), log) as url:
        signed = url.replace("//", "//me:secret@") + "/?Policy=secret"
        with pytest.raises(LabError, match="1,000 bytes are kept") as error:
            loop.download(signed)
    assert "secret" not in str(error.value)
    assert len(log) > 2 and all(r.with_credentials for r in log)
    (sidecar,) = loop.models.rglob("*.partial.json")
    assert BIG in sidecar.read_text() and "secret" not in sidecar.read_text()


def test_the_forms_of_a_path(loop, tables):
    tables["tiny"].files["S/w.{0}.pth"] = FileFacts()
    with pytest.raises(NotFound, match="was not found in"):
        loop.download()
    asked = [r.path for r in loop.log if r.path.endswith("w.{0}.pth")]
    assert asked == ["tiny/S/w.{0}.pth", "S/w.{0}.pth", "w.{0}.pth"]


def test_credentials_stay_with_the_host_they_were_given_for(loop, tmp_path):
    log = []
    with serve_files(loop.served.parent, log=log) as elsewhere:
        loop.faults[BIG] = Fault(redirect=f"{elsewhere}/{BIG}")
        loop.download(loop.url.replace("//", "//me:secret@"))
    assert whole(loop.models)
    assert [(r.path, r.status, r.with_credentials) for r in log] == [(BIG, 200, False)]


def test_no_default_source_says_what_to_do(loop):
    with pytest.raises(NotFound) as error:
        transfer.download("tiny-model", loop.models)
    assert "licensed copy" in error.value.why
    assert "llamalab download tiny-model --source tiny=WHERE" in error.value.fix
    assert not loop.models.exists()


def test_a_lab_part_comes_from_the_checkout(loop, tables, monkeypatch):
    object.__setattr__(tables["tiny"], "source", "lab")
    monkeypatch.setattr(sources, "project_directory", lambda: loop.models.parent)
    with pytest.raises(NotFound, match="data/lab"):
        transfer.download("tiny", loop.models)
    lay_out(loop.models.parent / "data" / "lab" / "tiny")
    transfer.download("tiny", loop.models)
    assert whole(loop.models)


def test_a_named_source_goes_to_its_part(loop):
    lay_out(loop.served.parent / "tiny-lora", {"a.json": b"{}"})
    both = [loop.url, f"tiny-lora={loop.url}"]
    made = transfer.download("tiny-model", loop.models, both)
    assert made == [loop.models / "tiny", loop.models / "tiny-lora"]
    assert (loop.models / "tiny-lora" / "a.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    "source, error, match",
    [
        ("ftp://127.0.0.1/x", UsageError, "ftp:"),
        ("ftp://me:secret@127.0.0.1/x", UsageError, "ftp:"),
        ("HTTP://me:secret@127.0.0.1/x", UsageError, "HTTP:"),
        ("file:///etc", UsageError, "file:"),
        ("hf:nothing", UsageError, "hf:"),
        ("http://", UsageError, "http:"),
        ("tinny=http://127.0.0.1/", UsageError, "tinny"),
        ("nowhere/at/all", NotFound, "no directory"),
        ("tiny=", NotFound, "no directory"),
        ("no\0where", NotFound, "no directory"),
        ("HTTP://127.0.0.1/", UsageError, "HTTP:"),
        ("http:/127.0.0.1/", UsageError, "http:"),
        ("http://127.0.0.1:port/", UsageError, "not a complete address"),
        ("http://127.0.0.1:99999/", UsageError, "not a complete address"),
        ("http://[::1/", UsageError, "not a complete address"),
        ("http://me:secret@/", UsageError, "not a complete address"),
        ("http://?x", UsageError, "not a complete address"),
        ("data:text/plain,x", NotFound, "no directory"),
        ("hf:../x", UsageError, "Hub repository"),
        ("hf:a/b/c", UsageError, "hf:"),
        ("hf:a/b@", UsageError, "hf:"),
        ("hf:a/b@v 1", UsageError, "hf:"),
        ("hf:a/b?x", UsageError, "hf:"),
        ("tiny=nowhere", NotFound, "no directory"),
    ],
)
def test_sources_that_are_none(loop, source, error, match):
    with pytest.raises(error, match=match) as refusal:
        loop.download(source)
    assert "secret" not in str(refusal.value)
    assert not loop.models.exists()


def test_a_source_for_no_part(loop):
    with pytest.raises(UsageError, match="for no part"):
        loop.download(name="tiny-lora")


def test_a_proxy_is_not_asked_for_loopback(loop, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    loop.download()
    assert whole(loop.models)


def test_an_address_of_ipv6(loop):
    """Brackets, a port, a password, a query and a fragment, in one address."""
    from http.server import ThreadingHTTPServer

    class Six(ThreadingHTTPServer):
        address_family = socket.AF_INET6

    try:
        with Six(("::1", 0), None):
            pass
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with serve_files(loop.served.parent, log=loop.log) as url:
        with tunnel(int(url.rpartition(":")[2])) as port:
            loop.download(f"http://me:secret@[::1]:{port}/tiny/?key=secret#part")
    assert whole(loop.models) and all(r.with_credentials for r in loop.log)


@contextlib.contextmanager
def tunnel(port):
    """Pass connections to [::1] on to 127.0.0.1:`port`; yield the port there."""
    import socketserver
    import threading

    class Pass(socketserver.BaseRequestHandler):
        def handle(self):
            with socket.create_connection(("127.0.0.1", port)) as there:
                up = threading.Thread(target=self.copy, args=(self.request, there), daemon=True)
                up.start()
                self.copy(there, self.request)

        def copy(self, source, target):
            with contextlib.suppress(OSError):
                while block := source.recv(1 << 16):
                    target.sendall(block)

    class Server(socketserver.ThreadingTCPServer):
        address_family, daemon_threads = socket.AF_INET6, True

    with Server(("::1", 0), Pass) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


HUB_FILE = "me/repo/resolve/v1/w.pth"


Hub = namedtuple("Hub", "faults log store_faults store_log settings")


@pytest.fixture
def hub(tmp_path):
    """A Hub that leads to another host for large files: its faults, both logs, its environment."""
    lay_out(tmp_path / "hub", {HUB_FILE: b""})
    lay_out(tmp_path / "store", {"blob": WEIGHTS})
    log, store_log, faults, store_faults = [], [], {}, {}
    with serve_files(tmp_path / "store", store_faults, store_log) as store:
        with serve_files(tmp_path / "hub", faults, log) as url:
            promise = {"X-Linked-ETag": f'"{SHA256}"', "X-Linked-Size": str(len(WEIGHTS))}
            promise["X-Repo-Commit"] = "a" * 40
            faults[HUB_FILE] = Fault(redirect=f"{store}/blob", headers=promise)
            settings = {"HF_ENDPOINT": url, "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path / "h")}
            yield Hub(faults, log, store_faults, store_log, settings)


def from_hub(models, sha256, settings, code=0):
    """Download `w.pth` of `hf:me/repo@v1` in a process of its own; return what it said."""
    process = child(sha256, "hf:me/repo@v1", models, "w.pth", **settings)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == code, messages.decode()
    assert b"hf_secret" not in messages
    return messages.decode()


def test_a_hub_repository_by_endpoint_and_token(hub, tmp_path):
    """The Hub's own URL and header building, and no token for the host that it redirects to."""
    from_hub(tmp_path / "models", SHA256, hub.settings)
    assert (tmp_path / "models" / "tiny" / "w.pth").read_bytes() == WEIGHTS
    files = [r for r in hub.log if r.path.startswith("me/")]
    assert [(r.path, r.status, r.with_credentials) for r in files] == [
        ("me/repo/resolve/v1/tiny/w.pth", 404, True),
        (HUB_FILE, 302, True),
    ]
    assert [(r.status, r.with_credentials) for r in hub.store_log] == [(200, False)]


def test_the_sha256_that_the_hub_promises_is_held_against_the_published_one(hub, tmp_path):
    other = "0" * 64
    assert other in from_hub(tmp_path / "models", other, hub.settings, code=1)
    assert accepted(tmp_path / "models") == set()
    assert len(hub.store_log) == 1  # looked at once, and not taken


def test_the_token_is_stored_nowhere(hub, tmp_path):
    hub.store_faults["blob"] = Fault(stall_after=200_000)
    process = child(SHA256, "hf:me/repo@v1", tmp_path / "models", "w.pth", **hub.settings)
    partial = tmp_path / "models" / "tiny" / "w.pth.partial"
    while not (partial.exists() and partial.stat().st_size == 200_000):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    files = [path for path in (tmp_path / "models").rglob("*") if path.is_file()]
    assert len(files) == 2 and not [path for path in files if b"hf_secret" in path.read_bytes()]


MODEL = """
    import sys
    from llamalab.catalog import FileFacts, ModelEntry, Part, catalog
    from llamalab.cli import main
    base = Part("tiny", "base", {"p.json": FileFacts()}, vocab=8)
    files = {"w.pth": FileFacts(sha256=sys.argv[1])}
    lora = Part("tiny-lora", "adapter", files, vocab=8, base="tiny", source="hf:me/repo@v1")
    parts = {"tiny": base, "tiny-lora": lora}
    catalog._tables = lambda: (parts, {"model": ModelEntry("model", base, (lora,))})
    sys.exit(main(["download", "model", "--models-dir", sys.argv[2], "--source", sys.argv[3]]))
"""


def test_the_base_from_where_it_is_said_and_the_adapter_from_the_hub(hub, tmp_path):
    """As `download chinese-llama-7b --source llama-7b=WHERE` does, each part to its place."""
    mine, models = lay_out(tmp_path / "mine", {"p.json": b"{}"}), tmp_path / "models"
    command = [sys.executable, "-c", textwrap.dedent(MODEL), SHA256, str(models), f"tiny={mine}"]
    environment = os.environ | hub.settings
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [str(models / "tiny"), str(models / "tiny-lora")], (
        done.stderr
    )
    assert (models / "tiny" / "p.json").read_bytes() == (mine / "p.json").read_bytes()
    assert (models / "tiny-lora" / "w.pth").read_bytes() == WEIGHTS


def test_a_hub_cache_made_by_the_hubs_own_code(hub, tmp_path):
    """Offline, what the cache holds is taken over and verified; what it does not is said."""
    code = "import huggingface_hub as h; h.hf_hub_download('me/repo', 'w.pth', revision='v1')"
    environment = os.environ | hub.settings
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    hub.log.clear()
    offline = hub.settings | {"HF_HUB_OFFLINE": "1"}
    from_hub(tmp_path / "models", SHA256, offline)
    (blob,) = (tmp_path / "h" / "hub" / "models--me--repo" / "blobs").iterdir()
    assert (tmp_path / "models" / "tiny" / "w.pth").read_bytes() == blob.read_bytes()
    (tmp_path / "models" / "tiny" / "w.pth").unlink()
    blob.write_bytes(WEIGHTS[:-1] + b"?")  # damaged in the cache: fetched, if that is allowed
    assert "HF_HUB_OFFLINE" in from_hub(tmp_path / "models", SHA256, offline, code=1)
    assert hub.log == []
    assert "damaged" in from_hub(tmp_path / "models", SHA256, hub.settings)
    assert (tmp_path / "models" / "tiny" / "w.pth").read_bytes() == WEIGHTS
    assert blob.read_bytes() == WEIGHTS[:-1] + b"?"
