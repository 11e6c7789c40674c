"""Documentation that derives from the code is what the code says."""

from lib_hires.parameter_table import README, with_table
from lib_hires.registry import TECHNIQUES


def test_the_readmes_parameter_table_is_current():
    text = README.read_text()
    assert with_table(text) == text, "run: ./dev python -m lib_hires.parameter_table"


def test_every_technique_is_in_the_table():
    text = README.read_text()
    for technique in TECHNIQUES:
        assert f"### {technique.title} (`{technique.name}`)" in text
        assert technique.summary in text
