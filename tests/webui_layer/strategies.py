"""Everything that JSON, a page or a careless caller can put where a setting belongs."""

from hypothesis import strategies as st

from lib_hires.registry import TECHNIQUES
from lib_hires.request import ENABLED, PRESET
from lib_hires.settings import params_of

FIELDS = [(t.name, field) for t in TECHNIQUES for field in (ENABLED, PRESET, *params_of(t.settings))]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**30, max_value=10**400),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=20),
    st.sampled_from(["on", "off", "2.5", "1e9", "nan", "bicubic", "4x", "6:2:0-0.2", "512x512", "", '"', "a, b: c\n"]),
)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
technique_requests = json_values | st.dictionaries(
    st.sampled_from([field for _, field in FIELDS]) | st.text(max_size=8), json_values, max_size=5
)
by_name = st.dictionaries(st.sampled_from([t.name for t in TECHNIQUES]) | st.text(max_size=8), technique_requests)
by_position = st.lists(json_values, max_size=16)
arguments = by_position | st.builds(lambda first, rest: [first, *rest], by_name, by_position)
axes = st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3)


def _valid(param):
    if param.kind == "toggle":
        return st.booleans()
    if param.kind == "integer":
        return st.integers(int(param.minimum), int(param.maximum))
    if param.kind == "number":
        return st.floats(param.minimum, param.maximum).map(lambda value: float(f"{value:.6g}"))
    if param.kind == "choice":
        return st.sampled_from(param.choices)
    return st.sampled_from([param.default, "6:2:0-0.2", "6:2:0-0.2; 3:1.5:0.2-0.5-0.7"])


def settings_of(technique):
    """Any valid settings of a technique."""
    params = params_of(technique.settings)
    return st.builds(technique.settings, **{name: _valid(param) for name, param in params.items()})


selections = st.fixed_dictionaries({}, optional={t.name: settings_of(t) for t in TECHNIQUES})
