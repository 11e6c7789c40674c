"""A test extension: makes faults inside the UNet on request, and reports what clings to the model.

For test machines only; copy the folder `fault_extension` into the WebUI's extensions folder (docs/testing.md).
API: `"alwayson_scripts": {"Hires test faults": {"args": ["raise", 3]}}` raises in the third UNet evaluation of the
generation, "interrupt" and "skip" press the buttons of the same name there, "count" does nothing but count.
GET /hires-test/state counts hooks, shadowed forwards and patches on the loaded model, and the rows that every UNet
evaluation of the last generation with such a request had.
"""

import gc

import gradio as gr
from modules import script_callbacks, scripts, shared


def unet_of(sd_model):
    """The torch module of the loaded model's UNet or transformer, in A1111 and in Forge."""
    if hasattr(sd_model, "forge_objects"):
        return sd_model.forge_objects.unet.model.diffusion_model
    return sd_model.model.diffusion_model


class Fault:
    """Counts UNet evaluations and acts in one of them, deep inside the network."""

    def __init__(self, kind, call):
        self.kind = kind
        self.call = call
        self.count = 0
        self.rows = []
        self.handle = None

    def arm(self, unet):
        self.disarm()
        deep = getattr(unet, "middle_block", [unet])[0]  # not the block itself: reForge runs its layers one by one
        self.handle = deep.register_forward_pre_hook(lambda _, args: self.on_evaluation(args))

    def disarm(self):
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def on_evaluation(self, args):
        self.count += 1
        self.rows.append(len(args[0]) if args else 0)
        if self.count != self.call:
            return
        self.disarm()
        if self.kind == "raise":
            raise RuntimeError("a fault made by the test extension")
        if self.kind == "interrupt":
            shared.state.interrupt()
        elif self.kind == "skip":
            shared.state.skip()


class HiresTestFaults(scripts.Script):
    armed: Fault | None = None  # shared by both tabs: one generation runs at a time
    rows: list = []

    @classmethod
    def disarm(cls):
        if cls.armed is not None:
            cls.armed.disarm()
            HiresTestFaults.rows = cls.armed.rows
        HiresTestFaults.armed = None

    def title(self):
        return "Hires test faults"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        kind = gr.Textbox(value="", label="Fault for tests", visible=False)
        call = gr.Number(value=0, label="Evaluation for tests", visible=False)
        return [kind, call]

    def before_process(self, p, kind="", call=0, *args):
        self.disarm()
        if kind:
            HiresTestFaults.armed = Fault(str(kind), int(call))

    def process_before_every_sampling(self, p, *args, **kwargs):
        if self.armed is not None:
            self.armed.arm(unet_of(p.sd_model))

    def postprocess(self, p, processed, *args):
        self.disarm()


def residue(sd_model):
    """What stays on the model between generations."""
    found = {"hooks": 0, "shadowed_forwards": 0, "patches": 0}
    try:
        unet = unet_of(sd_model)
    except AttributeError:  # Forge loads the model with the first generation
        return found
    for module in unet.modules():
        found["hooks"] += len(module._forward_hooks) + len(module._forward_pre_hooks)
        # the host's own HyperTile stays on the layers that it has seen, and counts as part of the host
        found["shadowed_forwards"] += "forward" in vars(module) and not hasattr(module, "__webui_hypertile_params")
    forge_objects = getattr(sd_model, "forge_objects", None)
    if forge_objects is not None:
        found["patches"] = _patches(forge_objects.unet.model_options)
    return found


def _patches(options):
    count = sum(1 for key in options if key.startswith("sampler_") or key == "model_function_wrapper")
    patches = options.get("transformer_options", {}).get("patches", {})
    return count + sum(len(functions) for functions in patches.values())


def alive(package):
    """Objects of the plugin that the garbage collector still finds, by class name."""
    gc.collect()
    counts = {}
    for thing in gc.get_objects():
        kind = type(thing)
        if str(getattr(kind, "__module__", "")).split(".")[0] == package:
            counts[kind.__name__] = counts.get(kind.__name__, 0) + 1
    return counts


def add_routes(demo, app):
    @app.get("/hires-test/state")
    def state(count_objects: bool = False):
        answer = {**residue(shared.sd_model), "rows": HiresTestFaults.rows}
        if count_objects:
            answer["alive"] = alive("lib_hires")
        return answer


script_callbacks.on_app_started(add_routes)
