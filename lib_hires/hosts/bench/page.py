"""The bench page: the plugin's own accordions around the embedded host, in a browser on this machine.

./dev page [--port 7870] [--open]
"""

from __future__ import annotations

import argparse
import logging
import random
import re
import threading
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from lib_hires import TITLE
from lib_hires.hosts.bench.model import LATENT_FACTOR, NATIVE_SIZE, BenchModels, load_models
from lib_hires.hosts.bench.pipeline import Bench, Interrupted, Request, Result
from lib_hires.hosts.bench.samplers import SAMPLERS
from lib_hires.hosts.bench.scenes import CAPTIONS
from lib_hires.registry import TECHNIQUES
from lib_hires.request import read_request
from lib_hires.webui import infotext, panel
from lib_hires.webui.presets import PresetStore

ROOT = Path(__file__).parents[3]
INTRODUCTION = f"""# {TITLE}: bench
A small model that draws one object per picture. It was trained at {NATIVE_SIZE} px: at {2 * NATIVE_SIZE} px it draws
several, as Stable Diffusion does above its own size. Switch DeepShrink on below, and it draws one again.
Prompts it knows: {", ".join(CAPTIONS[:3])} ... ({len(CAPTIONS)} in all: disc, square, diamond, ring in six colours)."""
MAX_PICTURES = 4
_JAVASCRIPT = "js" if hasattr(gr, "on") else "_js"  # gradio 4 and 3


class Page:
    """One bench and its page. Generations run one at a time; Stop ends the current one."""

    def __init__(self, models: BenchModels, store: PresetStore | None = None) -> None:
        self._bench = Bench(models)
        self._store = store or PresetStore()
        self._stop = threading.Event()
        self._busy = threading.Lock()

    def blocks(self) -> gr.Blocks:
        css = (ROOT / "style.css").read_text()
        with gr.Blocks(title=f"{TITLE} bench", css=css, theme=_theme(), analytics_enabled=False) as page:
            gr.Markdown(INTRODUCTION)
            with gr.Row():
                with gr.Column():
                    inputs = _inputs()
                    with gr.Row():
                        generate = gr.Button("Generate", variant="primary", elem_id="generate")
                        stop = gr.Button("Stop", elem_id="stop")
                with gr.Column():
                    gallery = gr.Gallery(
                        label="Pictures", elem_id="gallery", columns=2, height=420, object_fit="contain"
                    )
                    written = gr.Textbox(label="Infotext", lines=4, elem_id="infotext", interactive=True)
                    read = gr.Button("Read infotext back into the controls", elem_id="read_infotext")
                    report = gr.HTML(elem_id="report")
            built = panel.build(lambda item: f"bench_{item}", self._store)
            built.follow(inputs["steps"])
            plain = list(inputs.values())
            generate.click(self._generate, [*plain, *built.arguments], [gallery, written, report])
            stop.click(self._stop.set, queue=False)
            page.load(None, **{_JAVASCRIPT: _scripts()})
            read.click(_read_infotext, [written], [*plain, *built.arguments], queue=False)
        return page

    def _generate(self, *values: Any, progress: Any = gr.Progress()) -> tuple[list[np.ndarray], str, str]:  # noqa: B008
        count = len(_LABELS)
        request = _request(dict(zip(_LABELS, values[:count], strict=True)))
        generation = read_request(values[count:])
        params = _plain_params(request)
        with self._busy:
            self._stop.clear()
            self._bench.after_call = lambda step, of: self._after_call(progress, step, of)
            try:
                result = self._bench.generate(request, generation)
            except Interrupted:
                raise gr.Error("Stopped") from None
        infotext.write(params, generation)
        notes = infotext.settle(params, generation)
        return list(result.pictures), _infotext(request, params), _report(result, [*generation.notes, *notes])

    def _after_call(self, progress: Any, step: int, of: int) -> None:
        progress((min(step + 1, of), of), desc="Sampling")
        if self._stop.is_set():
            raise Interrupted


def _scripts() -> str:
    """What a WebUI loads by itself from the folder javascript/."""
    files = sorted((ROOT / "javascript").glob("*.js"))
    return "() => {" + "\n".join(file.read_text(encoding="utf-8") for file in files) + "}"


# The page's own settings: name -> infotext key
_LABELS = {
    "prompt": "Prompt",
    "width": "Width",
    "height": "Height",
    "steps": "Steps",
    "cfg_scale": "CFG scale",
    "sampler": "Sampler",
    "seed": "Seed",
    "count": "Pictures",
    "hires_scale": "Hires upscale",
}


def _theme() -> Any:
    """gradio's own look with the system's fonts: its default theme asks a server on the internet for them."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])


def _inputs() -> dict[str, Any]:
    size = {"minimum": 64, "maximum": 4 * NATIVE_SIZE, "step": LATENT_FACTOR}
    inputs: dict[str, Any] = {"prompt": gr.Textbox("a red ring", label="Prompt", elem_id="prompt")}
    with gr.Row():
        inputs["width"] = gr.Slider(value=2 * NATIVE_SIZE, label="Width", elem_id="width", **size)
        inputs["height"] = gr.Slider(value=2 * NATIVE_SIZE, label="Height", elem_id="height", **size)
    with gr.Row():
        inputs["steps"] = gr.Slider(1, 60, 20, step=1, label="Steps", elem_id="steps")
        inputs["cfg_scale"] = gr.Slider(1.0, 12.0, 3.0, step=0.5, label="CFG scale", elem_id="cfg_scale")
    with gr.Row():
        inputs["sampler"] = gr.Dropdown(list(SAMPLERS), value="Euler", label="Sampler", elem_id="sampler")
        inputs["seed"] = gr.Number(1, label="Seed (-1: random)", precision=0, elem_id="seed")
    with gr.Row():
        inputs["count"] = gr.Slider(1, MAX_PICTURES, 2, step=1, label="Pictures", elem_id="count")
        inputs["hires_scale"] = gr.Slider(
            1.0, 2.0, 1.0, step=0.25, label="Hires upscale (1: off)", elem_id="hires_scale"
        )
    return inputs


def _request(values: dict[str, Any]) -> Request:
    count, seed = int(values["count"]), int(values["seed"] if values["seed"] is not None else -1)
    first = random.randrange(2**31) if seed < 0 else seed
    width, height = (max(1, round(values[side] / LATENT_FACTOR)) * LATENT_FACTOR for side in ("width", "height"))
    return Request(
        prompts=(str(values["prompt"]),) * count,
        seeds=tuple(range(first, first + count)),
        width=width,
        height=height,
        steps=int(values["steps"]),
        cfg_scale=float(values["cfg_scale"]),
        sampler=str(values["sampler"]),
        hires_scale=float(values["hires_scale"]),
    )


def _plain_params(request: Request) -> dict[str, Any]:
    return {
        "Steps": request.steps,
        "Sampler": request.sampler,
        "CFG scale": f"{request.cfg_scale:g}",
        "Seed": request.seeds[0],
        "Width": request.width,
        "Height": request.height,
        "Pictures": len(request.seeds),
        "Hires upscale": f"{request.hires_scale:g}",
    }


def _infotext(request: Request, params: dict[str, Any]) -> str:
    quoted = (
        f'{key}: "{value}"' if re.search("[,:]", str(value)) else f"{key}: {value}" for key, value in params.items()
    )
    return f"{request.prompts[0]}\n{', '.join(quoted)}"


def parse_infotext(text: str) -> dict[str, str]:
    """Prompt on the first lines, `key: value` pairs on the last."""
    prompt, _, last = text.strip().rpartition("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    return {"Prompt": prompt.strip()} | {key: value.strip().strip('"') for key, value in pairs}


def _read_infotext(text: str) -> list[Any]:
    params = parse_infotext(text)
    plain = [_plain_update(name, params.get(label)) for name, label in _LABELS.items()]
    targets = [target for technique in TECHNIQUES for target in infotext.paste_targets(technique)]
    ours = [target(params) for target in targets]
    return [*plain, *(gr.update() if value is None else gr.update(value=value) for value in ours)]


def _plain_update(name: str, raw: str | None) -> Any:
    if not raw:
        return gr.update()
    if name in ("prompt", "sampler"):
        return gr.update(value=raw) if name == "prompt" or raw in SAMPLERS else gr.update()
    try:
        return gr.update(value=float(raw))
    except ValueError:
        return gr.update()


def _report(result: Result, notes: Sequence[str]) -> str:
    lines = [plan.report() for plan in result.plans if plan.patches or plan.resting or plan.refused]
    lines += [*notes, f"{result.seconds:.1f} s, {result.unet_calls} UNet calls"]
    return "<br>".join(escape(line) for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="./dev page", description="The bench page, on this machine only.")
    parser.add_argument("--port", type=int, default=7870)
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    parser.add_argument("--presets", type=Path, help="file of your own presets (default: user/ in this folder)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format=f"[{TITLE}] %(message)s")
    store = PresetStore(options.presets) if options.presets else PresetStore()
    page = Page(load_models(), store).blocks()
    page.queue().launch(
        server_name="127.0.0.1", server_port=options.port, inbrowser=options.open, share=False, show_api=False
    )


if __name__ == "__main__":
    main()
