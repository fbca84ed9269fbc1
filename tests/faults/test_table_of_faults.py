"""docs/reliability.md names tests that exist, and has all fifteen faults."""

import re

from commands import ROOT

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_each_test_that_it_names_exists():
    names = set(re.findall(r"\btest_\w+(?![\w.])", re.sub(r"test_\w+\.py", "", PAGE)))
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(names) > 40
    assert {name for name in names if f"def {name}(" not in code} == set()


def test_it_has_fifteen_faults():
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| [^|]+ \| (.+) \|$", PAGE, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 16))
    assert all("`test_" in tests for _, tests in rows)
