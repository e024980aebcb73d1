"""The address of MLflow's store: whether a server answers, and who receives the password."""

import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from milan.tracking import logger, store
from tests.tracking.test_tracker import write_spool


class Status(BaseHTTPRequestHandler):
    """A server that answers with the status in the path."""

    def do_GET(self):
        self.send_response(int(self.path[1:]))
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Status) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_any_answer_is_a_server_but_a_proxy_s_error(server):
    for status in (200, 302, 401, 404, 500):
        store.check_reachable(f"{server}/{status}")
    for status in (502, 503, 504):
        with pytest.raises(OSError, match=f"answers {status}"):
            store.check_reachable(f"{server}/{status}")


@pytest.mark.parametrize("uri", ["http://127.0.0.1:{}", "postgresql://milan:sesame@127.0.0.1:{}/mlflow"])
def test_no_server_at_the_port(uri, workplace, monkeypatch, capsys):
    """The error comes at once, without a connection by mlflow, and without the password."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(port))
    spool = write_spool([{"kind": "start"}])
    logger.deliver(spool)
    said = capsys.readouterr().out
    assert "MLflow cannot be reached" in said and "efused" in said and "sesame" not in said
    assert spool.exists() and spool.with_suffix(".failed").exists()


def test_a_server_that_accepts_and_never_answers_is_given_up(workplace, monkeypatch, capsys):
    monkeypatch.setattr(store, "ANSWER_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        logger.deliver(write_spool([{"kind": "start"}]))
    assert "ReadTimeout" in capsys.readouterr().out


def test_only_mlflow_gets_the_password(monkeypatch):
    """Special characters in it are percent-encoded, as in every address."""
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "another")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mi%40lan:se%2Fsame@example.org:5000/mlflow")
    assert store.store_uri() == os.environ["MLFLOW_TRACKING_URI"] == "https://example.org:5000/mlflow"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "mi@lan" and os.environ["MLFLOW_TRACKING_PASSWORD"] == "se/same"
    assert store.store_uri() == "https://example.org:5000/mlflow"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "se/same"


@pytest.mark.parametrize("uri", ["https://example.org/mlflow", "postgresql://milan:sesame@example.org/mlflow", "databricks"])
def test_other_addresses_are_unchanged(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "milan")
    assert store.store_uri() == uri and os.environ["MLFLOW_TRACKING_USERNAME"] == "milan"


def test_an_empty_address_means_the_default(workplace, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert store.store_uri() == f"sqlite:///{workplace}/mlflow.db"
    odd = workplace / "a #1? 100%"
    (odd / ".dvc/tmp/exps/tmp1").mkdir(parents=True)
    monkeypatch.chdir(odd)
    assert store.store_uri() == "sqlite:///mlflow.db"
    monkeypatch.chdir(odd / ".dvc/tmp/exps/tmp1")
    assert store.store_uri() == "sqlite:///../../../../mlflow.db"


def test_the_file_of_a_store():
    files = {"sqlite:////a#b/c d/m.db?timeout=9": "/a#b/c d/m.db", "sqlite:///m.db": "m.db", "file:///a%20b/%23c": "/a b/#c", "x/y#z": "x/y#z"}
    assert {uri: str(store.file_of(uri)) for uri in files} == files
    assert store.file_of("https://example.org/a") is None
