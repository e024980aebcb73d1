"""Where MLflow's store is, and whether anybody is there."""

import contextlib
import os
import socket
from urllib.parse import unquote, urlsplit

from milan.core.files import project_root

KNOCK = 10.0  # seconds that a server has to show itself


def store_uri() -> str:
    """The store, without a password: it goes into variables that mlflow reads, and so into no text that mlflow writes."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project_root()}/mlflow.db"
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or "@" not in parts.netloc:
        return uri
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
    os.environ["MLFLOW_TRACKING_URI"] = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return os.environ["MLFLOW_TRACKING_URI"]


def knock(uri: str) -> None:
    """OSError within seconds when a server is not there: mlflow would try for minutes, for every spool again."""
    import requests

    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        with contextlib.suppress(requests.exceptions.SSLError):  # somebody answered: mlflow has its own settings for TLS
            answer = requests.get(uri, timeout=KNOCK, allow_redirects=False)
            if answer.status_code in (502, 503, 504):  # a proxy, and nobody behind it
                raise ConnectionError(f"{uri} answers {answer.status_code} {answer.reason}")
    elif parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), timeout=KNOCK).close()
