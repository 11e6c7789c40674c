"""The README's command, small: what it draws, counts, prints and writes."""

import json

import numpy as np
import pytest
from PIL import Image

from lib_hires.hosts.bench import compare


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    compare.main(["--pictures", "4", "--rows", "native,naive,composition", "--workers", "2", "--out", str(folder)])
    return folder, json.loads((folder / "numbers.json").read_text())["rows"]


def test_one_object_at_native_size_several_naively_at_twice_the_size_and_one_with_deep_shrink(job):
    _, rows = job
    assert rows["native"]["errors"] == 0
    assert rows["naive"]["errors"] >= 3 and np.mean(rows["naive"]["counts"]) > 2
    assert rows["composition"]["errors"] <= 1


def test_the_cost_is_told(job):
    _, rows = job
    assert all(row["unet_calls_per_picture"] == 20 and row["seconds_per_picture"] > 0 for row in rows.values())
    assert rows["naive"]["size"] == [256, 256]


def test_the_contact_sheet_shows_every_row_and_prompt(job):
    folder, _ = job
    sheet = Image.open(folder / "contact_sheet.png")
    assert sheet.width > 4 * 160 and sheet.height > 3 * 160
    assert np.asarray(sheet.convert("L")).std() > 10


def test_rows_are_paired_by_prompt_and_seed():
    assert len({compare.prompt(index) for index in range(24)}) == 24, "all captions, equally often"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows", "native,nonsense"], "nonsense"),
        (["--pictures", "0"], "--pictures 0"),
        (["--steps", "-1"], "--steps -1"),
    ],
)
def test_bad_arguments_are_named(arguments, words, capsys):
    with pytest.raises(SystemExit):
        compare.parse(arguments)
    assert words in capsys.readouterr().err
