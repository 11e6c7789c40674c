"""The names of attention layers: what they mean in SD 1.x and SDXL, and what a wrong one is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.attention_blocks import BlockChoice, layer_names, parse_blocks, resolve_blocks
from lib_hires.topology import INPUT, MIDDLE, OUTPUT, AttentionLayer, UNetTopology


def layers_of(side, depths):
    return [AttentionLayer(side, block, depth) for block, count in depths.items() for depth in range(count)]


def topology(blocks, down, middle, up):
    attention = layers_of(INPUT, down) + layers_of(MIDDLE, {0: middle}) + layers_of(OUTPUT, up)
    return UNetTopology(blocks, blocks, (3, 6, 9), tuple(attention))


SD15 = topology(12, dict.fromkeys((1, 2, 4, 5, 7, 8), 1), 1, dict.fromkeys(range(3, 12), 1))
SDXL = topology(9, {4: 2, 5: 2, 7: 10, 8: 10}, 10, {0: 10, 1: 10, 2: 10, 3: 2, 4: 2, 5: 2})


def resolved(grammar, unet):
    return resolve_blocks(parse_blocks(grammar), unet)


@pytest.mark.parametrize(
    ("grammar", "unet", "want"),
    [
        ("m0", SD15, layers_of(MIDDLE, {0: 1})),
        ("m0", SDXL, layers_of(MIDDLE, {0: 10})),
        ("d0", SD15, layers_of(INPUT, {1: 1})),
        ("d5", SD15, layers_of(INPUT, {8: 1})),
        ("u0, u8", SD15, layers_of(OUTPUT, {3: 1, 11: 1})),
        ("u0.4", SDXL, [AttentionLayer(OUTPUT, 0, 4)]),
        ("D2.2-9", SDXL, layers_of(INPUT, {7: 10})[2:]),
        ("u5,d0", SDXL, layers_of(INPUT, {4: 2}) + layers_of(OUTPUT, {5: 2})),
        (" m0.3-5 , m0.5 ,m0.4,", SDXL, [AttentionLayer(MIDDLE, 0, depth) for depth in (3, 4, 5)]),
    ],
)
def test_names_mean_layers_with_attention(grammar, unet, want):
    assert resolved(grammar, unet) == tuple(want)


@pytest.mark.parametrize(
    "bad", ["m", "0", "x0", "m0.", "m0.1-", "m-1", "m0.2.3", "m0;u0", "d2.-9", "m0 u0", "m٣", "m12345"]
)
def test_bad_grammar_names_the_form(bad):
    with pytest.raises(ValueError, match=r"is not of the form .*m0, u0\.4, d2\.2-9"):
        parse_blocks(bad)


@pytest.mark.parametrize("empty", ["", " , "])
def test_an_empty_list_is_an_error(empty):
    with pytest.raises(ValueError, match="at least one block"):
        parse_blocks(empty)


def test_depths_that_run_backwards_are_turned_around_in_the_message():
    with pytest.raises(ValueError, match=r"write d2\.2-9"):
        parse_blocks("d2.9-2")


@pytest.mark.parametrize(
    ("grammar", "unet", "words"),
    [
        ("d6", SD15, "d6 does not exist; blocks with attention are d0 to d5, m0, u0 to u8"),
        ("m1", SDXL, "m1 does not exist; blocks with attention are d0 to d3, m0, u0 to u5"),
        ("d2.2-9", SD15, "d2.2-9 does not exist; d2 has only depth 0"),
        ("m0.7-10", SDXL, "m0.7-10 does not exist; m0 has depths 0 to 9"),
        ("m0", UNetTopology(1, 1, ()), "blocks with attention are none"),
    ],
)
def test_what_does_not_exist_is_told_with_what_does(grammar, unet, words):
    with pytest.raises(LookupError, match=words):
        resolved(grammar, unet)


@st.composite
def choices(draw):
    side, number = draw(st.sampled_from([INPUT, MIDDLE, OUTPUT])), draw(st.integers(0, 9999))
    depths = draw(st.one_of(st.none(), st.tuples(st.integers(0, 99), st.integers(0, 99))))
    return BlockChoice(side, number) if depths is None else BlockChoice(side, number, min(depths), max(depths))


@given(st.lists(choices(), min_size=1, max_size=5))
def test_what_is_written_is_read_back(parts):
    assert parse_blocks(", ".join(str(part) for part in parts)) == tuple(parts)


@given(chosen=st.sets(st.sampled_from(SDXL.attention), min_size=1))
def test_layers_are_named_so_that_the_names_mean_them(chosen):
    layers = tuple(layer for layer in SDXL.attention if layer in chosen)
    assert resolved(layer_names(layers, SDXL), SDXL) == layers


def test_whole_blocks_have_short_names():
    assert layer_names(resolved("m0, d2.2-9, u3.0-1, u0.4", SDXL), SDXL) == "d2.2-9, m0, u0.4, u3"
