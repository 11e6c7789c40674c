"""What is written into a picture's infotext comes back the same through a host's parser, and never lies."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.generation import Generation
from lib_hires.registry import BY_NAME, TECHNIQUES
from lib_hires.request import positional_fields, read_request
from lib_hires.settings import Unusable, params_of
from lib_hires.webui import infotext
from tests.webui_layer import strategies

DEEP_SHRINK = BY_NAME["deep_shrink"]
KIND = DEEP_SHRINK.settings

# the grammar of both hosts' parsers
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_KEY = re.compile(r"\w[\w \-/]+")
_SIZE = re.compile(r"\d+x\d+")
# what the hosts themselves write, where it could be mistaken for a name of ours
_HOSTS_KEYS = """Steps, Sampler, Schedule type, CFG scale, Image CFG scale, Distilled CFG Scale, Seed, Size, Model,
VAE, Model hash, Denoising strength, Clip skip, ENSD, RNG, Version, Tiling, Eta, NGMS, Skip Early CFG, Refiner,
Hypertile U-Net, Refiner switch at, Hires upscale, Hires steps, Hires upscaler, Hires resize, Hires CFG Scale, Hires
prompt, Prompt, Negative prompt, Sigma noise, Sigma churn, Sigma Adjustment, Noise Schedule, Noise multiplier, Extra
noise, Rescale CFG, Mask blur, Mask mode, Masked content, Inpaint area, Emphasis, Randomness, Script, TI, Pad conds,
SGM noise multiplier, Token merging ratio, Schedule rho, Beta schedule alpha, Dynamic clip skip, Variation seed,
Soft inpainting enabled"""


each_technique = pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda technique: technique.name)


def as_line(params):
    quoted = {k: json.dumps(v, ensure_ascii=False) if set(str(v)) & set(",:\n") else v for k, v in params.items()}
    return ", ".join(f"{key}: {value}" for key, value in {"Steps": 20, **quoted, "Version": "v1"}.items())


def parsed(line):
    return {key: json.loads(value) if value.startswith('"') else value for key, value in _PAIR.findall(line)}


def pasted(params):
    """What a host puts into the components, in positional order, None for "as it is"."""
    return [target(params) for technique in TECHNIQUES for target in infotext.paste_targets(technique)]


@given(strategies.selections)
def test_round_trip(selection):
    params = {}
    infotext.write(params, Generation(selection))
    back = pasted(parsed(as_line(params)))
    assert read_request(back).selection == selection
    for technique in TECHNIQUES:
        count = len(positional_fields(technique))
        (switch, *values), back = back[:count], back[count:]
        assert switch is (technique.name in selection)
        if not switch:
            assert values == [None] * len(values)
    assert back == []


@given(st.dictionaries(st.sampled_from(infotext.all_keys()), strategies.json_values))
def test_broken_infotext_gives_right_typed_valid_values(params):
    for technique in TECHNIQUES:
        switch, *values = (target(params) for target in infotext.paste_targets(technique))
        assert isinstance(switch, bool)
        for value, param in zip(values, params_of(technique.settings).values(), strict=True):
            # an API converts what is not of the component's own type, and a failing conversion fails the request
            assert value is None or (isinstance(value, type(param.default)) and param.read(value) == (value, None))


def test_keys_and_values_survive_the_hosts_grammar():
    keys = infotext.all_keys()
    assert len(keys) == len(set(keys))
    for key in keys:
        assert _KEY.fullmatch(key), f"{key!r} is no infotext key"
    for technique in TECHNIQUES:
        for param in params_of(technique.settings).values():
            for choice in param.choices:
                assert not _SIZE.fullmatch(choice), f"hosts split {choice!r} into two keys"


@each_technique
def test_an_empty_text_is_the_default_or_not_valid(technique):
    """The hosts' grammar has no empty value."""
    for param in params_of(technique.settings).values():
        if param.kind in ("text", "painting") and param.default != "":
            with pytest.raises(Unusable):
                param.read("")


def test_keys_are_told_apart_by_people_and_by_careless_searches():
    keys = [key.casefold() for key in infotext.all_keys()]
    assert len(keys) == len(set(keys)), "keys that differ in case only"
    assert keys == [" ".join(key.split()) for key in keys]
    assert not set(keys) & {key.strip().casefold() for key in _HOSTS_KEYS.split(",")}
    assert not [key for key in keys if re.search(r"-[12]$", key)], "hosts split sizes into keys that end so"
    for technique in TECHNIQUES:
        own = {infotext.key(technique, field) for field in positional_fields(technique)}
        others = [key for key in infotext.all_keys() if key not in own]
        begun = f"{technique.title} ".casefold()
        assert not [key for key in others if f"{key} ".casefold().startswith(begun)]


@each_technique
def test_a_technique_alone_comes_back_alone(technique):
    settings, params = strategies.all_changed(technique), {}
    infotext.write(params, Generation({technique.name: settings}, ["a note: with, marks"]))
    read = parsed(as_line(params))
    assert read == {"Steps": "20", **params, "Version": "v1"}
    assert len(params) == 1 + len(positional_fields(technique)), "its title, every changed field and the note"
    assert read_request(pasted(read)).selection == {technique.name: settings}
    for other in TECHNIQUES:
        if other is not technique:
            assert infotext.read(other, read) == (False, None, [])


@each_technique
def test_a_bare_title_in_another_text_switches_nothing_else_on(technique):
    switched = [infotext.read(other, {technique.title: "on"})[0] for other in TECHNIQUES]
    assert switched == [other is technique for other in TECHNIQUES]


def test_only_what_differs_is_written():
    params = {"Steps": 3}
    infotext.write(params, Generation({"deep_shrink": KIND(factor=2.5, after_skip=False)}))
    assert params == {
        "Steps": 3,
        "DeepShrink": "on",
        "DeepShrink Downscale factor": "2.5",
        "DeepShrink Shrink after skip": "off",
    }


def test_other_cells_keys_are_taken_away_first():
    params = {"Steps": 3}
    infotext.write(params, Generation({"deep_shrink": KIND(factor=2.5)}, ["a note"]))
    infotext.write(params, Generation())
    assert params == {"Steps": 3}


@given(st.sets(st.sampled_from([infotext.key(t, field) for t in TECHNIQUES for field in params_of(t.settings)])))
def test_a_text_without_our_titles_switches_off_and_moves_nothing(keys):
    for technique in TECHNIQUES:
        switch, *values = (
            target({"Steps": "3", **dict.fromkeys(keys, "3")}) for target in infotext.paste_targets(technique)
        )
        assert switch is False and set(values) == {None}


def test_a_label_that_was_renamed_is_still_read():
    read = lambda params: read_request(pasted({"Iterative mixing": "on", **params})).selection["iterative_mixing"]
    assert read({"Iterative mixing Alpha of plain areas": "0.7"}).plain_alpha == 0.7
    both = {"Iterative mixing Alpha of plain areas": "0.7", "Iterative mixing Alpha elsewhere": "0.9"}
    assert read(both).plain_alpha == 0.9
    params = {}
    infotext.write(params, Generation({"iterative_mixing": read({"Iterative mixing Alpha elsewhere": "0.7"})}))
    assert list(params) == ["Iterative mixing", "Iterative mixing Alpha elsewhere"]


def test_a_painted_map_needs_no_quotes():
    params = {}
    infotext.write(params, Generation({"iterative_mixing": strategies.all_changed(BY_NAME["iterative_mixing"])}))
    assert f"Iterative mixing Painted map: {strategies.BLOB}," in as_line(params)


def test_missing_keys_are_defaults():
    assert read_request(pasted({"DeepShrink": "on", "DeepShrink End": "0.2"})).selection == {
        "deep_shrink": KIND(end=0.2)
    }


@pytest.mark.parametrize(
    ("key", "value", "switch", "words"),
    [
        ("DeepShrink Downscale factor", "1e9", True, "nearest bound 9"),
        ("DeepShrink Downscale factor", "much", False, "0.5 to 9"),
        ("DeepShrink More stages", "nonsense", False, "block:factor"),
    ],
)
def test_what_was_wrong_reaches_the_request(key, value, switch, words):
    values = pasted({"DeepShrink": "on", key: value})
    assert values[0] is switch
    (note,) = read_request(values).notes
    assert words in note


def test_targets_are_also_keys_for_send_to():
    targets = infotext.paste_targets(DEEP_SHRINK)
    assert targets[:2] == ["DeepShrink", "DeepShrink Block number"]
    assert all(isinstance(target, str) and callable(target) for target in targets)


def settled(generation):
    params = {"DeepShrink": "on"}
    return infotext.settle(params, generation), params


def test_settling_keeps_what_acted():
    news, params = settled(Generation({"deep_shrink": KIND(factor=3.0)}, acted={"deep_shrink"}))
    assert news == []
    assert params == {"DeepShrink": "on", "DeepShrink Downscale factor": "3"}


@pytest.mark.parametrize(
    ("outcome", "note"),
    [
        ({}, f"DeepShrink did nothing: {infotext._NEVER_ACTED}"),
        ({"rested": {"DeepShrink": "factor 1"}}, "DeepShrink did nothing: factor 1"),
        ({"warned": {"DeepShrink": "a twin is on"}}, "DeepShrink did nothing: a twin is on"),
        ({"refused": {"DeepShrink": "no UNet"}}, "DeepShrink was refused: no UNet"),
    ],
)
def test_settling_takes_away_what_did_not_act_and_says_why(outcome, note):
    news, params = settled(Generation({"deep_shrink": KIND()}, ["before"], **outcome))
    assert news == [note]
    assert params == {infotext.NOTE: f"before; {note}"}


def test_a_refusal_in_one_pass_is_told_beside_the_pass_that_acted():
    outcome = Generation({"deep_shrink": KIND()}, acted={"deep_shrink"}, refused={"DeepShrink": "no such block"})
    _, params = settled(outcome)
    assert params == {"DeepShrink": "on", infotext.NOTE: "DeepShrink was refused: no such block"}
