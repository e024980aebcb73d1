"""The address of MLflow's store: is anybody there, and where does its password go?"""

import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from milan.tracking import logger, store
from tests.tracking.test_tracker import write_spool


class Doorkeeper(BaseHTTPRequestHandler):
    """Answers with the status that the path names."""

    def do_GET(self):
        self.send_response(int(self.path[1:]))
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def door() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Doorkeeper) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_whoever_answers_is_there_and_a_proxy_without_a_server_is_not(door):
    for status in (200, 302, 401, 404, 500):
        store.check_reachable(f"{door}/{status}")
    for status in (502, 503, 504):
        with pytest.raises(OSError, match=f"answers {status}"):
            store.check_reachable(f"{door}/{status}")


@pytest.mark.parametrize("uri", ["http://127.0.0.1:{}", "postgresql://milan:sesame@127.0.0.1:{}/mlflow"])
def test_nobody_at_the_port(uri, workplace, monkeypatch, capsys):
    """Said at once, without a try by mlflow, and without the password."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(port))
    spool = write_spool([{"kind": "start"}])
    logger.deliver(spool)
    said = capsys.readouterr().out
    assert "MLflow cannot be reached" in said and "efused" in said and "sesame" not in said
    assert spool.exists() and spool.with_suffix(".failed").exists()


def test_a_server_that_accepts_and_says_nothing_is_given_up(workplace, monkeypatch, capsys):
    monkeypatch.setattr(store, "ANSWER_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        logger.deliver(write_spool([{"kind": "start"}]))
    assert "ReadTimeout" in capsys.readouterr().out


def test_a_password_goes_to_mlflow_alone(monkeypatch):
    """Signs of an address in it are escaped, as in every address."""
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "another")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mi%40lan:se%2Fsame@example.org:5000/mlflow")
    assert store.store_uri() == os.environ["MLFLOW_TRACKING_URI"] == "https://example.org:5000/mlflow"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "mi@lan" and os.environ["MLFLOW_TRACKING_PASSWORD"] == "se/same"
    assert store.store_uri() == "https://example.org:5000/mlflow"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "se/same"


@pytest.mark.parametrize("uri", ["https://example.org/mlflow", "postgresql://milan:sesame@example.org/mlflow", "databricks"])
def test_other_addresses_are_left_alone(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "milan")
    assert store.store_uri() == uri and os.environ["MLFLOW_TRACKING_USERNAME"] == "milan"


def test_an_address_that_is_empty_is_none(workplace, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert store.store_uri() == f"sqlite:///{workplace}/mlflow.db"
