"""Everything that JSON, a page or a careless caller can put where a setting belongs."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lib_hires.painted_map import LONGEST_SIDE, WHITE, encode
from lib_hires.registry import TECHNIQUES
from lib_hires.request import ENABLED, PRESET, positional_fields
from lib_hires.settings import params_of

FIELDS = [(t.name, field) for t in TECHNIQUES for field in (ENABLED, PRESET, *params_of(t.settings))]
COMPONENTS = [(t, field) for t in TECHNIQUES for field in positional_fields(t)]  # the positional list

BLOB = encode(np.where(np.hypot(*np.mgrid[-20:28, -30:34]) < 13, WHITE, 0))

# Valid texts for each text parameter, as its grammar cannot be drawn from. A new one needs its line here.
EXAMPLES = {
    ("cascade", "factors"): ["2, 2", "1.5, 2"],
    ("cascade", "denoise"): ["0.6", "0.6, 0.4"],
    ("cascade", "steps"): ["20", "20, 12"],
    ("cascade", "cfg_scale"): ["7.5", "7, 9"],
    ("cascade", "changes"): ["deep_shrink.factor = 2, 4", "apg.eta = 0.5; deep_shrink.factor = 2, 4"],
    ("dilation", "layers"): ("m", "i6.down i7-8 m", "i10, i11, m"),
    ("deep_shrink", "more_stages"): ["6:2:0-0.2", "6:2:0-0.2; 3:1.5:0.2-0.5-0.7"],
    ("iterative_mixing", "painting"): [BLOB],
    ("pag", "blocks"): ["u0.4", "m0, d2.2-9", "D1, u0"],
}

painted = (
    st.tuples(*[st.integers(1, LONGEST_SIDE)] * 2)
    .flatmap(lambda shape: arrays(np.uint8, shape, elements=st.integers(0, WHITE)))
    .map(encode)
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**30, max_value=10**400),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=20),
    st.sampled_from(["on", "off", "2.5", "1e9", "nan", "bicubic", "4x", "6:2:0-0.2", "512x512", "", '"', "a, b: c\n"]),
    st.sampled_from(["data:,", "2x2."]),
)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def _request_of(technique):
    fields = st.sampled_from([ENABLED, PRESET, *params_of(technique.settings)])
    return json_values | st.dictionaries(fields | st.text(max_size=8), json_values, max_size=5)


def _some_replaced(changes):
    values = [False if field == ENABLED else params_of(t.settings)[field].default for t, field in COMPONENTS] + [None]
    return [changes.get(place, value) for place, value in enumerate(values)]


by_name = st.lists(
    st.sampled_from(TECHNIQUES).flatmap(lambda t: st.tuples(st.just(t.name), _request_of(t)))
    | st.tuples(st.text(max_size=8), json_values),
    max_size=4,
).map(dict)
short_lists = st.lists(json_values, max_size=16)
# anything anywhere in a list as long as the page's, with one value too many
long_lists = st.dictionaries(st.integers(0, len(COMPONENTS)), json_values, max_size=5).map(_some_replaced)
by_position = short_lists | long_lists
arguments = by_position | st.builds(lambda first, rest: [first, *rest], by_name, short_lists)
axes = st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3)


def examples(technique, field):
    """Valid texts for a text parameter: its default and those noted above."""
    noted = EXAMPLES.get((technique.name, field))
    assert noted, f"tests/webui_layer/strategies.py needs EXAMPLES for the text {field!r} of {technique.title}"
    param = params_of(technique.settings)[field]
    for text in (param.default, *noted):
        assert param.read(text) == (text, None), f"{text!r} is no valid example of {field!r} of {technique.title}"
    return [param.default, *noted]


def valid(technique, field):
    """Any valid value of a technique's parameter."""
    param = params_of(technique.settings)[field]
    if param.kind == "toggle":
        return st.booleans()
    if param.kind == "integer":
        return st.integers(int(param.minimum), int(param.maximum))
    if param.kind == "number":
        return st.floats(param.minimum, param.maximum).map(lambda value: float(f"{value:.6g}"))
    if param.kind == "choice":
        return st.sampled_from(param.choices)
    if param.kind == "painting":
        return st.just("") | painted
    return st.sampled_from(examples(technique, field))


def settings_of(technique):
    """Any valid settings of a technique."""
    return st.builds(technique.settings, **{field: valid(technique, field) for field in params_of(technique.settings)})


def other_value(technique, field):
    """A valid value that is not the default."""
    param = params_of(technique.settings)[field]
    if param.kind == "toggle":
        return not param.default
    if param.kind == "choice":
        return next(choice for choice in param.choices if choice != param.default)
    if param.kind in ("text", "painting"):
        return next(text for text in examples(technique, field) if text != param.default)
    return type(param.default)(param.maximum if param.default != param.maximum else param.minimum)


def all_changed(technique):
    """Settings that differ from the defaults in every field."""
    return technique.settings(**{field: other_value(technique, field) for field in params_of(technique.settings)})


selections = st.fixed_dictionaries({}, optional={t.name: settings_of(t) for t in TECHNIQUES})
