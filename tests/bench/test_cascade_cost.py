"""What a cascade costs: no stage adds to the memory of another, and what the command measures, prints and draws."""

import json
import math
import xml.etree.ElementTree as ET

import pytest
import torch

from lib_hires.generation import Generation
from lib_hires.hosts.bench import cascade_cost, line_chart
from lib_hires.hosts.bench.cascade_cost import AT_ONCE, CASCADE, HOWS, LAST_STAGE, Cost, Job
from lib_hires.hosts.bench.evaluation import LiveBytes
from lib_hires.hosts.bench.pipeline import Request
from lib_hires.techniques.hires.cascade import CascadeSettings

SVG = "{http://www.w3.org/2000/svg}"
BASE = 32


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    cascade_cost.main(["--base", str(BASE), "--scales", "2,4", "--steps", "1", "--out", str(folder)])
    rows = json.loads((folder / "numbers.json").read_text())["rows"]
    return folder, {(row["how"], row["size"]): row for row in rows}


def series_of(svg):
    """Points of each series, of each panel: {name: [(x, y), ...]}."""
    return [
        {group.get("data-name"): points_of(group) for group in panel.iter(f"{SVG}g") if group.get("class") == "series"}
        for panel in ET.fromstring(svg).iter(f"{SVG}g")
        if panel.get("class") == "panel"
    ]


def points_of(group):
    path = group.find(f"{SVG}polyline").get("points")
    return [tuple(float(part) for part in point.split(",")) for point in path.split()]


def peak_of(bench, scale, how, base=BASE, steps=2):
    models = bench.models
    held = [*models.unet.parameters(), *models.unet.buffers(), *models.vae.autoencoder.parameters()]
    with LiveBytes(held, "cpu") as live:
        cascade_cost.draw(bench, Job(how, scale, base, steps, ""))
    return live.peak


def test_a_cascade_holds_what_its_last_stage_holds(bench):
    for scale in (4, 8):
        at_once, cascade, last = (peak_of(bench, scale, how) for how in HOWS)
        assert cascade == pytest.approx(at_once, rel=0.001)
        assert 0.97 * last < cascade < last, "img2img keeps the picture that it was given"


def test_stages_of_one_size_hold_what_one_of_them_holds(bench):
    """Were anything of a stage kept, five of them would hold more than two."""
    settings = CascadeSettings(factors="2, 1, 1, 1, 1"), CascadeSettings(factors="2, 1")
    peaks = []
    for setting in settings:
        with LiveBytes(bench.models.unet.parameters(), "cpu") as live:
            bench.generate(
                Request(("a red ring",), (5,), BASE, BASE, 2, hires_scale=2.0), Generation({"cascade": setting})
            )
        peaks.append(live.peak)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


def test_the_last_stage_alone_begins_at_half_of_the_size_and_does_all_steps(bench):
    calls = bench.unet_calls
    cost = cascade_cost.cost_of(bench, Job(LAST_STAGE, 4, BASE, 3, ""))
    assert cost.unet_calls == bench.unet_calls - calls == 3
    assert cost.seconds > 0 and cost.peak_bytes >= 0


def test_a_peak_is_what_was_held_in_between():
    held = cascade_cost.start_memory_peak()
    block = torch.ones(64, 2**20)  # 256 MiB
    del block
    taken = cascade_cost.resident("VmHWM") - held
    assert taken == pytest.approx(2**28, rel=0.1)
    assert cascade_cost.resident("VmHWM") - cascade_cost.start_memory_peak() > 0.9 * 2**28, "set back only when asked"


def test_the_command_measures_every_size_and_way(job):
    _, rows = job
    assert set(rows) == {(how, BASE * scale) for how in HOWS for scale in (2, 4)}
    calls = {how: rows[how, BASE * 4]["unet_calls"] for how in HOWS}
    assert calls == {AT_ONCE: 2, CASCADE: 3, LAST_STAGE: 1}
    for (how, size), row in rows.items():
        assert row["seconds"] > 0 and row["mebibytes"] > 0
        assert (row["seconds_growth"] is None) == (row["mebibytes_growth"] is None) == (size == BASE * 2)
        assert how != AT_ONCE or row["seconds_of_at_once"] == 1
        assert how != LAST_STAGE or row["mebibytes_of_last_stage"] == 1
    assert rows[CASCADE, BASE * 4]["mebibytes_of_last_stage"] == pytest.approx(1, abs=0.25)


def test_the_plot_holds_every_series_and_number(job):
    folder, rows = job
    svg = (folder / "cascade_cost.svg").read_text()
    panels = series_of(svg)
    assert [set(panel) for panel in panels] == [set(HOWS)] * 2
    assert all(len(points) == 2 for panel in panels for points in panel.values())
    texts = ["".join(text.itertext()) for text in ET.fromstring(svg).iter(f"{SVG}text")]
    assert {*HOWS, "Time", "Peak memory", "64", "128"} <= set(texts)
    for panel, number in zip(panels, ("seconds", "mebibytes"), strict=True):
        for how, ((_, first), (_, second)) in panel.items():
            assert (second < first) == (rows[how, BASE * 4][number] > rows[how, BASE * 2][number]), "more is higher up"


def test_growth_is_the_exponent_of_the_pixels():
    costs = {(AT_ONCE, scale): Cost(3.0 * scale**2, 5 * scale**4, 1) for scale in (2, 4, 8)}
    assert cascade_cost.growth(costs, AT_ONCE, (2, 4, 8), cascade_cost.seconds_of) == [None, 1, 1]
    assert cascade_cost.growth(costs, AT_ONCE, (2, 4, 8), cascade_cost.mebibytes_of) == [None, 2, 2]


def test_repeats_give_the_least_time_and_the_most_memory():
    assert cascade_cost.best_of([Cost(2.0, 10, 7), Cost(1.0, 9, 7)]) == Cost(1.0, 10, 7)


def test_a_power_law_is_a_straight_line():
    ticks = {"1": 1.0, "2": 2.0, "4": 4.0}
    chart = line_chart.line_chart(
        [line_chart.Panel("a < b", "y", {"one": [(x, x**2) for x in ticks.values()]})], "x", ticks
    )
    [panel] = series_of(chart)
    (x0, y0), (x1, y1), (x2, y2) = panel["one"]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert y2 < y1 < y0


@pytest.mark.parametrize(
    ("low", "high", "ticks"), [(3, 40, [2, 5, 10, 20, 50]), (1, 10, [1, 2, 5, 10]), (0.07, 0.3, [0.05, 0.1, 0.2, 0.5])]
)
def test_ticks_enclose_the_values(low, high, ticks):
    assert line_chart.decade_ticks(low, high) == pytest.approx(ticks)
    assert math.isfinite(sum(ticks))


@pytest.mark.parametrize(
    "arguments", [["--scales", "2"], ["--scales", "1,2"], ["--steps", "0"], ["--repeats", "0"], ["--base", "100"]]
)
def test_bad_arguments_are_named(arguments, capsys):
    with pytest.raises(SystemExit):
        cascade_cost.parse(arguments)
    assert arguments[1] in capsys.readouterr().err
