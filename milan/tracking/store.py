"""The address of MLflow's store, a quick check that its server answers, and the project's own store after a move."""

import contextlib
import os
import socket
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

from milan.core.files import project_root

ANSWER_TIMEOUT = 10.0  # seconds
ARTIFACTS = "/mlartifacts/"  # the folder of artifacts in the project
LOCATIONS = {  # table: column that holds the absolute path of artifacts
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}


def store_uri() -> str:
    """Return the store's address without its password: MLFLOW_TRACKING_URI, else the file mlflow.db in the project.

    User and password move to the variables that mlflow reads, so that mlflow writes them into no text."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or file_uri(project_root() / "mlflow.db")
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or "@" not in parts.netloc:
        return uri
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
    os.environ["MLFLOW_TRACKING_URI"] = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return os.environ["MLFLOW_TRACKING_URI"]


def file_uri(path: Path) -> str:
    """Return the address of an SQLite file; relative where the folders above have characters that mean something in a URI, which
    mlflow and the versions of SQLAlchemy decode differently."""
    return f"sqlite:///{os.path.relpath(path) if set('?#%') & set(str(path)) else path}"


def file_of(uri: str) -> Path | None:
    """Return the file or folder of a store on this machine; None for a server's address."""
    parts = urlsplit(uri)
    return {
        "sqlite": Path(uri.removeprefix("sqlite:///").partition("?")[0]),
        "file": Path(unquote(parts.path)),
        "": Path(uri),
    }.get(parts.scheme)


def check_reachable(uri: str) -> None:
    """Raise OSError when a server does not answer within seconds; mlflow itself would try for minutes, for every spool."""
    import requests

    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        with contextlib.suppress(requests.exceptions.SSLError):  # a server answers; mlflow has its own settings for TLS
            answer = requests.get(uri, timeout=ANSWER_TIMEOUT, allow_redirects=False)
            if answer.status_code in (502, 503, 504):  # a proxy without its server
                raise ConnectionError(f"{uri} answers {answer.status_code} {answer.reason}")
    elif parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), timeout=ANSWER_TIMEOUT).close()


def follow_project(root: Path) -> None:
    """Correct the artifacts' paths in the project's own store after the project's folder was moved, renamed or copied.

    MLflow stores absolute paths: new artifacts would go to the old place, and the served model could not be loaded."""
    database, here = root / "mlflow.db", root.as_uri() + ARTIFACTS
    if os.environ.get("MLFLOW_TRACKING_URI") or not database.exists():
        return
    with contextlib.closing(sqlite3.connect(database)) as store, store:
        known = [location for (location,) in store.execute("SELECT artifact_location FROM experiments")]
        places = {location.rpartition(ARTIFACTS)[0] + ARTIFACTS for location in known if ARTIFACTS in location}
        for place in places - {here}:
            for table, column in LOCATIONS.items():
                store.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", [place, here])
