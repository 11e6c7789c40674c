"""Documentation that derives from the code is what the code says."""

from lib_hires.parameter_table import PAGE, page
from lib_hires.registry import TECHNIQUES
from lib_hires.settings import params_of


def test_the_parameter_page_is_current():
    assert PAGE.read_text() == page(), "run: ./dev python -m lib_hires.parameter_table"


def test_every_technique_and_setting_is_on_the_page():
    text = PAGE.read_text()
    for technique in TECHNIQUES:
        assert f"### {technique.title} (`{technique.name}`)" in text
        assert technique.summary in text
        assert all(f"`{name}`" in text for name in params_of(technique.settings))
