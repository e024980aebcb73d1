"""The fast subset: its list of slow tests names tests that exist."""

import re

import pytest

from tests.conftest import ROOT, SLOW


@pytest.mark.parametrize("entry", SLOW)
def test_a_slow_test_exists(entry):
    file, _, name = entry.partition("::")
    assert (ROOT / "tests" / file).is_file()
    assert not name or re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.M)
