"""Entry point for the WebUI: hands its hooks over to the package."""

from modules import scripts

from lib_hires import TITLE
from lib_hires.webui import extension


class HiresPlusScript(scripts.Script):
    sorting_priority = 14.5  # Forge: beside its own hires techniques

    def __init__(self):
        self._tab = extension.Tab()

    def title(self):
        return TITLE

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def after_component(self, component, **kwargs):
        if getattr(component, "elem_id", None) == f"{self.tabname}_steps":
            self._tab.offer_steps(component)

    def ui(self, is_img2img):
        return self._tab.build(self)

    def process(self, p, *args):
        extension.begin(p, args)

    def before_process_batch(self, p, *args, **kwargs):
        extension.announce(p)

    def process_before_every_sampling(self, p, *args, x=None, noise=None, **kwargs):
        extension.attach(p, x, noise)

    def on_mask_blend(self, p, mba, *args):
        extension.blend(p, mba)

    def postprocess_maskoverlay(self, p, ppmo, *args):
        extension.overlay(p, ppmo)

    def postprocess_batch(self, p, *args, **kwargs):
        extension.settle(p)


extension.register()
