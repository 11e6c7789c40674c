"""Other extensions on the self-attention are found and named, on modules and on a patcher."""

from types import SimpleNamespace

from torch import nn

from lib_hires.hosts.others import on_modules, on_patcher, scripts_on
from lib_hires.topology import self_attention_modules
from tests.doubles import LdmMiniUNet


def layers(unet):
    return list(self_attention_modules(unet).values())


def test_an_untouched_network_has_no_others():
    assert on_modules(LdmMiniUNet(attention=True)) == []


def test_hypertile_only_while_it_is_on():
    unet = LdmMiniUNet(attention=True)
    layer = layers(unet)[0]
    layer.forward = lambda x: x
    setattr(layer, "__webui_hypertile_params", SimpleNamespace(enabled=False))
    assert on_modules(unet) == []
    setattr(layer, "__webui_hypertile_params", SimpleNamespace(enabled=True))
    [told] = on_modules(unet)
    assert told.startswith("HyperTile acts in the layers")


def test_token_merging():
    unet = LdmMiniUNet(attention=True)
    unet.extra = type("ToMeBlock", (nn.Module,), {})()
    [told] = on_modules(unet)
    assert told.startswith("token merging (ToMe)")


def test_a_replaced_forward_is_named_once_by_its_module():
    unet = LdmMiniUNet(attention=True)
    for layer in layers(unet):
        layer.forward = lambda x: x
    [told] = on_modules(unet)
    assert told.startswith(f"{__name__} acts in the layers")


def test_functions_on_a_patcher():
    def replacement(*_):
        """As IP-Adapter's."""

    def merging(*_):
        """As ToMe's."""

    merging.__module__ = "backend.misc.tomesd"
    options = {
        "patches": {"attn1_patch": [merging]},
        "patches_replace": {"attn1": {("middle", 0): replacement, ("input", 1): replacement}},
    }
    told = on_patcher(SimpleNamespace(model_options={"transformer_options": options}))
    assert [line.split(" ")[0] for line in told] == ["token", __name__]
    assert on_patcher(SimpleNamespace(model_options={})) == []


def a_script(title, args_from, args_to):
    return SimpleNamespace(title=lambda: title, args_from=args_from, args_to=args_to)


def test_scripts_are_on_by_their_first_value():
    scripts = [a_script("on", 1, 3), a_script("off", 3, 4), a_script("by name", 4, 5), a_script("empty", 5, 5)]
    values = (0, True, False, False, {"deep_shrink": {}}, True)
    p = SimpleNamespace(scripts=SimpleNamespace(alwayson_scripts=scripts), script_args=values)
    assert scripts_on(p) == ("on",)
    assert scripts_on(SimpleNamespace()) == scripts_on(SimpleNamespace(scripts=None)) == ()
    assert scripts_on(SimpleNamespace(scripts=p.scripts, script_args=[])) == (), "a request without values"
