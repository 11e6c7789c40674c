"""Guidance in a running WebUI: every technique alone, together, with all samplers, prompts, passes and models."""

from __future__ import annotations

from typing import Any

import pytest

from .client import A1111, FORGE, distance, is_alive, same, shrink
from .test_samplers import SAMPLERS, SLOW

# settings that act visibly within two steps
ALONE: dict[str, dict[str, Any]] = {
    "tcfg": {},
    "fresca": {"scale_high": 2.0},
    "apg": {"norm_threshold": 2.0},
    "rescale_cfg": {"multiplier": 1.0},
    "renorm_cfg": {"renorm": 0.5},
    "cfg_norm": {},
    "mahiro": {},
    "pag": {},
    "sag": {"scale": 2.0},
}
SEG = {"mode": "SEG (blurred queries)"}
COMBINATIONS: dict[str, tuple[str, ...]] = {
    "PAG with SAG on one layer": ("pag", "sag"),
    "APG with RescaleCFG": ("apg", "rescale_cfg"),
    "SAG with DeepShrink": ("deep_shrink", "sag"),
    "all that act before mixing": ("tcfg", "fresca", "apg"),
    "all norms": ("rescale_cfg", "renorm_cfg", "cfg_norm", "mahiro"),
    "everything": ("deep_shrink", *ALONE),
}
LONG = ", ".join(["a very tall old lighthouse on a cliff above a stormy green sea"] * 7)  # more than 75 tokens


def asking(*names: str) -> dict[str, Any]:
    """A request with these techniques, with settings that act."""
    return {name: shrink()["deep_shrink"] if name == "deep_shrink" else ALONE[name] for name in names}


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
@pytest.mark.parametrize("name", ALONE)
def test_each_alone(webui, name, sampler):
    request = {"sampler_name": sampler, "steps": 4}
    off, on = webui.txt2img(**request), webui.txt2img(asking(name), **request)
    assert on.status == 200, on.body
    assert on.acted(name) and not on.note
    assert is_alive(on.picture)
    assert distance(on.picture, off.picture) > 0.02
    again = webui.txt2img(**request)
    assert same(again.picture, off.picture) and not again.keys


@pytest.mark.parametrize("title", COMBINATIONS)
def test_together(webui, unharmed, title):
    names = COMBINATIONS[title]
    answers = [webui.txt2img(asking(*names[:count]), steps=4) for count in (len(names), len(names) - 1)]
    assert answers[0].status == 200, answers[0].body
    assert answers[0].acted(*names) and not answers[0].note
    assert is_alive(answers[0].picture)
    assert not same(answers[0].picture, answers[1].picture)
    unharmed()


@pytest.mark.parametrize(("sampler", "scheduler", "steps"), SAMPLERS, ids=str)
def test_all_samplers(webui, sampler, scheduler, steps):
    if sampler not in webui.samplers:
        pytest.skip(f"{webui.host} has no {sampler}")
    request = {"sampler_name": sampler, "scheduler": scheduler, "steps": steps, "width": 64, "height": 64}
    names = ("apg", "rescale_cfg", "pag", "sag")
    off, on = webui.txt2img(**request), webui.txt2img(asking(*names), **request)
    assert on.status == 200, on.body
    assert on.acted("apg", "rescale_cfg", "pag")
    assert is_alive(on.picture)
    assert distance(on.picture, off.picture) > 0.1
    if sampler not in SLOW:
        assert same(webui.txt2img(**request).picture, off.picture)


def test_seg_is_another_picture_than_pag(webui):
    pag, seg = (webui.txt2img({"pag": settings}) for settings in ({}, SEG))
    assert seg.acted("pag") and is_alive(seg.picture)
    assert distance(pag.picture, seg.picture) > 0.1


@pytest.mark.parametrize("tab", ["hires", "img2img", "inpaint"])
def test_passes(webui, tab):
    make = getattr(webui, tab)
    off, on = make(), make(asking("apg", "rescale_cfg", "pag", "sag"))
    assert on.acted("apg", "rescale_cfg", "pag", "sag"), on.infotext
    assert is_alive(on.picture)
    assert distance(on.picture, off.picture) > 0.1
    assert same(make().picture, off.picture)


def test_the_hires_pass_alone(webui):
    off = webui.hires()
    on = webui.hires({"pag": {"passes": "Hires pass"}})
    assert on.acted("pag")
    assert distance(on.picture, off.picture) > 0.1
    first = webui.txt2img({"pag": {"passes": "Hires pass"}})
    assert not first.acted("pag")


PROMPTS = [
    ("a lighthouse AND a dog", "bad"),
    ("a lighthouse :1.1 AND a dog :0.6", "bad"),
    (LONG, "bad"),
    ("a lighthouse", LONG),
    (LONG + " AND a dog :0.5", "bad"),
]


@pytest.mark.parametrize(("prompt", "negative"), PROMPTS, ids=["AND", "weights", "long", "long negative", "long AND"])
def test_prompts_in_batches(webui, prompt, negative):
    request = {"prompt": prompt, "negative_prompt": negative}
    names = ("tcfg", "apg", "rescale_cfg", "mahiro", "pag", "sag")
    off = webui.txt2img(batch_size=2, seed=20, **request)
    on = webui.txt2img(asking(*names), batch_size=2, seed=20, **request)
    assert on.status == 200, on.body
    assert on.acted(*names)
    for k in range(2):
        assert is_alive(on.pictures[k])
        assert distance(on.pictures[k], off.pictures[k]) > 0.1
        single = webui.txt2img(asking(*names), seed=20 + k, **request)
        assert distance(on.pictures[k], single.picture) < 0.5, f"picture {k} depends on its batch mate"


@pytest.mark.parametrize("prompt", ["a lighthouse AND a dog", "a lighthouse :1.1 AND a dog :0.6 AND rain :0.3"])
@pytest.mark.parametrize("way", ["CFG 1", "NGMS"])
def test_sag_without_uncond_keeps_the_pictures_of_a_batch_apart(webui, prompt, way):
    request = {"prompt": prompt, "steps": 4, "cfg_scale": 1 if way == "CFG 1" else 5}
    request["s_min_uncond"] = 20.0 if way == "NGMS" else 0.0
    batch = webui.txt2img(asking("sag"), batch_size=2, seed=20, **request)
    assert batch.status == 200 and batch.acted("sag"), batch.body
    plain = webui.txt2img(batch_size=2, seed=20, **request)
    for k in range(2):
        single = webui.txt2img(asking("sag"), seed=20 + k, **request)
        assert distance(batch.pictures[k], plain.pictures[k]) > 0.02
        assert distance(batch.pictures[k], single.picture) < 0.02, f"picture {k} depends on its batch mate"


NEUTRAL = {
    "tcfg": {"strength": 0.0},
    "fresca": {"scale_low": 1.0, "scale_high": 1.0},
    "apg": {"eta": 1.0, "norm_threshold": 0.0, "momentum": 0.0},
    "rescale_cfg": {"multiplier": 0.0},
    "renorm_cfg": {"renorm": 0.0},
    "cfg_norm": {"strength": 0.0},
    "pag": {"scale": 0.0},
    "sag": {"scale": 0.0},
}


def test_neutral_settings_are_off_to_the_last_bit(webui, plain):
    for name, settings in NEUTRAL.items():
        answer = webui.txt2img({name: settings})
        assert same(answer.picture, plain), name
        assert not answer.acted(name)


def test_without_cfg_only_what_needs_no_negative_prompt_acts(webui):
    off = webui.txt2img(cfg_scale=1)
    on = webui.txt2img(asking("pag"), cfg_scale=1)
    assert on.acted("pag") and distance(on.picture, off.picture) > 0.1
    for name in ("tcfg", "rescale_cfg", "mahiro"):
        answer = webui.txt2img(asking(name), cfg_scale=1)
        assert answer.status == 200 and distance(answer.picture, off.picture) < 0.5


@pytest.mark.usefixtures("faults")
def test_pag_rides_in_the_same_evaluation_and_sag_takes_one_of_its_own(webui):
    def rows(plugin, **request):
        assert webui.txt2img(plugin, fault=("count", 0), **request).status == 200
        return webui.residue()["rows"]

    assert rows(None) == [2, 2]
    assert rows(asking("pag")) == [3, 3]
    assert rows(asking("sag")) == [2, 1, 2, 1]
    assert rows(asking("pag"), prompt=LONG) in ([2, 1, 2, 1], [3, 3], [1, 2, 1, 2])


@pytest.mark.usefixtures("faults")
def test_truncated_guidance_really_skips_the_negative_prompt(webui):
    request = {"steps": 6}
    assert webui.txt2img(None, fault=("count", 0), **request).status == 200
    whole = sum(webui.residue()["rows"])
    answer = webui.txt2img({"renorm_cfg": {"guidance_until": 0.5}}, fault=("count", 0), **request)
    assert answer.status == 200 and answer.acted("renorm_cfg") and is_alive(answer.picture)
    assert 6 <= sum(webui.residue()["rows"]) < whole


@pytest.mark.parametrize("way", ["NGMS", "skip early"])
def test_steps_in_which_the_host_skips_uncond(webui, way):
    if way == "skip early" and webui.host == FORGE:
        pytest.skip("Forge reads it elsewhere")
    request = {"steps": 4, "s_min_uncond": 20.0 if way == "NGMS" else 0.0}
    names = ("apg", "rescale_cfg", "mahiro", "pag", "sag")
    # as an option, not as an override: A1111 does not put overrides back
    webui.set_options(skip_early_cond=0.5 if way == "skip early" else 0.0)
    try:
        off, on = webui.txt2img(**request), webui.txt2img(asking(*names), **request)
    finally:
        webui.set_options(skip_early_cond=0.0)
    assert on.status == 200, on.body
    assert on.acted("pag") and is_alive(on.picture)
    assert distance(on.picture, off.picture) > 0.1


def test_one_row_at_a_time_gives_the_same_picture(webui):
    if webui.host != A1111:
        pytest.skip("Forge decides by free memory")
    names = ("apg", "pag", "sag")
    together = webui.txt2img(asking(*names), batch_size=2)
    webui.set_options(batch_cond_uncond=False)
    try:
        apart = webui.txt2img(asking(*names), batch_size=2)
    finally:
        webui.set_options(batch_cond_uncond=True)
    assert all(distance(a, b) < 0.5 for a, b in zip(together.pictures, apart.pictures, strict=True))


@pytest.mark.parametrize("family", ["sdxl", "v-prediction"])
def test_other_unets(on_family, family):
    webui = on_family(family)
    names = tuple(ALONE)
    off, on = webui.txt2img(), webui.txt2img(asking(*names))
    assert on.status == 200, on.body
    assert on.acted(*names) and is_alive(on.picture)
    assert distance(on.picture, off.picture) > 0.1
    assert same(webui.txt2img().picture, off.picture)


def test_a_flow_transformer(on_family):
    webui = on_family("dit")
    request = {"scheduler": "Simple", "steps": 2}
    names = tuple(name for name in ALONE if name not in ("pag", "sag"))
    off, on = webui.txt2img(**request), webui.txt2img(asking(*ALONE), **request)
    assert on.status == 200, on.body
    assert on.acted(*names) and is_alive(on.picture)
    assert distance(on.picture, off.picture) > 0.1
    assert "PAG" in on.note and "SAG" in on.note and "not a UNet" in on.note
    assert same(webui.txt2img(**request).picture, off.picture)


@pytest.mark.usefixtures("faults")
@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DDIM"])
def test_a_fault_inside_the_unet(webui, unharmed, sampler):
    for evaluation in (3, 4):  # one of them is SAG's own
        plugin = asking("deep_shrink", *ALONE)
        answer = webui.txt2img(plugin, fault=("raise", evaluation), steps=4, sampler_name=sampler)
        assert answer.status == 500 and "a fault made by the test extension" in answer.body
    unharmed()
