"""Redact credentials, home paths and user names from logs and reports."""

import os
import re
from pathlib import Path

LOGIN = re.compile(r"(?<=://)[^/\s]*@")  # user:token@ of a URL
QUERY = re.compile(r"(\b\w[\w+.-]*://[^\s?]*\?)[^\s'\")]+")  # signature and token of a presigned URL


def redact(value):
    """Return text with *** for login and query of each URL, ~ for the home folder and $USER for the user's name in a path.

    Lists are redacted item by item; any other value is returned as it is."""
    if isinstance(value, list):
        return [redact(item) for item in value]
    if not isinstance(value, str):
        return value
    return without_user(QUERY.sub(r"\1***", LOGIN.sub("***@", value)))


def without_user(text: str) -> str:
    """Return text with ~ for the home folder and $USER for the user's name in a path."""
    home, user = Path(os.path.expanduser("~")), os.environ.get("USER")
    if len(home.parts) > 1:
        text = re.sub(rf"(?<![\w.-]){re.escape(str(home))}(?![\w.-])", "~", text)
    return re.sub(rf"(?<=/){re.escape(user)}(?=/|$)", "$USER", text, flags=re.M) if user else text
