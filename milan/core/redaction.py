"""What leaves a machine, in a log or on a page, tells no secrets: no credentials in addresses, and not who sits at it."""

import os
import re
from pathlib import Path

LOGIN = re.compile(r"(?<=://)[^/\s]*@")  # user:token@ of an address
QUERY = re.compile(r"(\b\w[\w+.-]*://[^\s?]*\?)[^\s'\")]+")  # signatures and tokens of an address that was signed beforehand


def redact(value):
    """Text with *** for the login and the query of each address in it, ~ for the home folder and $USER for the user's
    name in a path; lists item by item, all else as it is."""
    if isinstance(value, list):
        return [redact(item) for item in value]
    if not isinstance(value, str):
        return value
    return without_user(QUERY.sub(r"\1***", LOGIN.sub("***@", value)))


def without_user(text: str) -> str:
    home, user = Path(os.path.expanduser("~")), os.environ.get("USER")
    if len(home.parts) > 1:
        text = re.sub(rf"(?<![\w.-]){re.escape(str(home))}(?![\w.-])", "~", text)
    return re.sub(rf"(?<=/){re.escape(user)}(?=/|$)", "$USER", text, flags=re.M) if user else text
