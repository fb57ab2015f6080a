"""The page of codes is the one that the catalogue writes."""

from conftest import ROOT

from utils.doctor.findings import catalogue
from utils.script import doctor


def test_the_page_of_codes_is_up_to_date():
    """utils/script/doctor.md is what `doctor --write_codes true` would write."""
    assert doctor.CODES_PAGE.read_text(encoding="utf-8") == catalogue()
    assert doctor.CODES_PAGE.is_relative_to(ROOT)
