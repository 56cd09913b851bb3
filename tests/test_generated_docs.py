"""What is generated in the documentation is what its sources say now: `make docs` would change nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def docs(script: Callable[[str], ModuleType]) -> ModuleType:
    pytest.importorskip("transformers")  # a host of one of the benchmarks
    return script("tools/docs.py")


def test_nothing_is_old(docs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert docs.main(["--check"]) == 0, capsys.readouterr().out
    pages = "".join(docs.generated().values())
    assert {kind for kind in docs.TABLES if f"<!-- {kind}" not in pages} == set(), "every kind has a place"
    for name in docs.performance_tables.TABLES:
        assert f"<!-- performance {name} -->" in pages, name
    for section in docs.settings_tables.sections():
        assert f"<!-- settings {section} -->" in pages, section


def test_an_old_table_is_noticed(docs: ModuleType) -> None:
    old = "# Page\n\n<!-- results -->\n| old |\n<!-- end of results -->\n"
    new = docs.write(old)
    assert "| old |" not in new and "| data | model |" in new and docs.write(new) == new


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- results -->", "has no <!-- end of results -->"),
        ("<!-- study pilot verdicts -->\n<!-- end of study pilot figures -->", "has no <!-- end of study pilot verdicts -->"),
        ("<!-- result -->\n<!-- end of result -->", "no such kind of table: settings, study"),
        ("<!-- settings engine -->\n<!-- end of settings engine -->", "no section 'engine'"),
        ("<!-- performance none -->\n<!-- end of performance none -->", "none.json is missing"),
    ],
)  # fmt: skip
def test_a_place_that_is_wrong(docs: ModuleType, page: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        docs.write(page)
