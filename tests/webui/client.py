"""A small client of the WebUI's HTTP API, and the requests that the tests share."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import requests
from PIL import Image

from lib_hires.registry import BY_NAME, TECHNIQUES

TITLE = "Hires Plus"
FAULTS = "Hires test faults"
NOTE = "Hires Plus note"
A1111, FORGE, REFORGE = "A1111", "Forge", "reForge"

Picture = np.ndarray
Block = Mapping[str, Any]

# Parts of a checkpoint's title by which a test finds a model of the kind it needs.
FAMILIES = {
    "sd1": ("sd15", "v1-5"),
    "v-prediction": ("-v.", "vpred", "v-pred"),
    "sdxl": ("xl",),
    "dit": ("sd3", "flux"),
    "inpainting": ("inpainting",),
}

_INFOTEXT_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def shrink(**values: Any) -> Block:
    """The plugin's API dict with DeepShrink, which also acts at the tests' small sizes."""
    return {"deep_shrink": {"only_above_native": False, **values}}


def read_infotext(text: str) -> dict[str, str]:
    """Keys and values of an infotext's last line."""
    line = text.strip().split("\n")[-1]
    pairs = _INFOTEXT_PAIR.findall(line)
    return {key: json.loads(value) if value.startswith('"') else value for key, value in pairs}


def ours(text: str) -> dict[str, str]:
    """The keys in an infotext that the plugin wrote."""
    titles = tuple(technique.title for technique in TECHNIQUES)
    return {k: v for k, v in read_infotext(text).items() if k.startswith((*titles, TITLE))}


@dataclass
class Answer:
    """What a generation request came back with."""

    status: int
    body: str
    pictures: list[Picture] = field(default_factory=list)
    infotexts: list[str] = field(default_factory=list)

    @property
    def picture(self) -> Picture:
        return self.pictures[0]

    @property
    def infotext(self) -> str:
        return self.infotexts[0]

    @property
    def keys(self) -> dict[str, str]:
        """The plugin's keys in the first picture's infotext."""
        return ours(self.infotext)

    @property
    def note(self) -> str:
        return self.keys.get(NOTE, "")

    @property
    def is_on(self) -> bool:
        return self.acted("deep_shrink")

    def acted(self, *techniques: str) -> bool:
        """Whether the infotext says that all of these acted."""
        return all(self.keys.get(BY_NAME[name].title) == "on" for name in techniques)


class WebUI:
    """A running A1111 or Forge."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._session = requests.Session()
        self._session.trust_env = False  # a local server needs no proxy
        self._session.headers["Connection"] = "close"  # Forge drops the connection after an error

    def get(self, path: str, **query: Any) -> Any:
        answer = self._session.get(self.url + path, params=query, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def post(self, path: str, body: Any) -> requests.Response:
        # not requests' own json argument: it refuses the NaN that some tests must send
        headers = {"Content-Type": "application/json"}
        return self._session.post(self.url + path, data=json.dumps(body), headers=headers, timeout=280)

    @cached_property
    def host(self) -> str:
        prefixes = {key.split("_")[0] for key in self.get("/sdapi/v1/options")}
        return next((host for host in (FORGE, REFORGE) if host.lower() in prefixes), A1111)

    @cached_property
    def scripts(self) -> list[dict[str, Any]]:
        return self.get("/sdapi/v1/script-info")

    def has_script(self, title: str) -> bool:
        return any(script["name"] == title.lower() for script in self.scripts)

    @cached_property
    def samplers(self) -> set[str]:
        return {sampler["name"] for sampler in self.get("/sdapi/v1/samplers")}

    def checkpoint(self, family: str) -> str | None:
        """Title of an installed checkpoint of a family, or None. A plain SD 1.5 wins over its variants."""
        titles = [model["title"] for model in self.get("/sdapi/v1/sd-models")]
        matching = [t for t in titles if any(part in t.lower() for part in FAMILIES[family])]
        if family == "sd1":
            matching = [t for t in matching if not any(part in t.lower() for part in FAMILIES["v-prediction"])]
        return min(matching, key=lambda title: len(title.split(" [")[0]), default=None)  # a hash comes with first use

    @contextmanager
    def using_checkpoint(self, title: str) -> Iterator[None]:
        before = self.get("/sdapi/v1/options")["sd_model_checkpoint"]
        self.set_options(sd_model_checkpoint=title)
        try:
            yield
        finally:
            self.set_options(sd_model_checkpoint=before)

    def set_options(self, **options: Any) -> None:
        self.post("/sdapi/v1/options", options).raise_for_status()

    def axis(self, label: str, tab: str = "txt2img") -> int:
        """Index of an X/Y/Z axis type."""
        labels = self.axes(tab)
        matching = [i for i, text in enumerate(labels) if text == label]
        assert len(matching) == 1, f"axis {label!r} is there {len(matching)} times: {labels}"
        return matching[0]

    def axes(self, tab: str = "txt2img") -> list[str]:
        is_img2img = tab == "img2img"
        script = next(s for s in self.scripts if s["name"] == "x/y/z plot" and s["is_img2img"] == is_img2img)
        return script["args"][0]["choices"]

    def residue(self, count_objects: bool = False) -> dict[str, Any] | None:
        """Hooks and patches on the loaded model, from the fault extension. None where it is not installed."""
        if not self.has_script(FAULTS):
            return None
        return self.get("/hires-test/state", count_objects=count_objects)

    # -- generations

    def txt2img(self, plugin: Block | Sequence[Any] | None = None, **overrides: Any) -> Answer:
        return self.generate("txt2img", plugin, **overrides)

    def hires(self, plugin: Block | Sequence[Any] | None = None, **overrides: Any) -> Answer:
        """txt2img with hires fix."""
        request = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}
        request["hr_second_pass_steps"] = 2
        if self.host == FORGE:
            request["hr_additional_modules"] = ["Use same choices"]
        if self.host != A1111:
            request["hr_cfg"] = 5
        return self.generate("txt2img", plugin, **{**request, **overrides})

    def img2img(self, plugin: Block | Sequence[Any] | None = None, **overrides: Any) -> Answer:
        if self.host == A1111:
            # it encodes the initial picture with the random state that the previous generation left behind
            self.txt2img(width=64, height=64, steps=1)
        request = {"init_images": [encode(scene())], "denoising_strength": 0.8, "steps": 3}
        return self.generate("img2img", plugin, **{**request, **overrides})

    def inpaint(self, plugin: Block | Sequence[Any] | None = None, **overrides: Any) -> Answer:
        return self.img2img(plugin, **{"mask": encode(half_mask()), "inpainting_fill": 1, **overrides})

    def generate(self, tab: str, plugin: Block | Sequence[Any] | None = None, **overrides: Any) -> Answer:
        request = {**BASE, **overrides}
        scripts = dict(request.pop("alwayson_scripts", {}))
        if plugin is not None:
            scripts[TITLE] = {"args": [plugin] if isinstance(plugin, Mapping) else list(plugin)}
        if fault := request.pop("fault", None):
            scripts[FAULTS] = {"args": list(fault)}
        if scripts:
            request["alwayson_scripts"] = scripts
        return self.read(self.post(f"/sdapi/v1/{tab}", request))

    @staticmethod
    def read(response: requests.Response) -> Answer:
        if not response.ok:
            return Answer(response.status_code, response.text)
        data = response.json()
        pictures = [decode(picture) for picture in data["images"]]
        return Answer(response.status_code, response.text[-2000:], pictures, json.loads(data["info"])["infotexts"])


BASE: dict[str, Any] = {
    "prompt": "a lighthouse",
    "negative_prompt": "bad",
    "width": 128,
    "height": 128,
    "steps": 2,
    "seed": 1,
    "sampler_name": "Euler",
    "scheduler": "Normal",
    "cfg_scale": 5,
    "styles": [],  # Forge refuses a request with an infotext and without this
}
QUICK: dict[str, Any] = {"steps": 1, "cfg_scale": 1}  # enough where only the request is under test


def encode(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def decode(text: str) -> Picture:
    data = base64.b64decode(text.split(",", 1)[-1])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def scene(width: int = 128, height: int = 128) -> Image.Image:
    """A picture with structure in it, to start img2img from."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // width, y * 255 // height, ((x // 16 + y // 16) % 2) * 200]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def half_mask(width: int = 128, height: int = 128) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def same(a: Picture, b: Picture) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def distance(a: Picture, b: Picture) -> float:
    """Mean absolute difference in grey levels."""
    assert a.shape == b.shape, f"{a.shape} against {b.shape}"
    return float(np.abs(a.astype(np.float32) - b.astype(np.float32)).mean())


def is_alive(picture: Picture) -> bool:
    """Neither one flat colour (a NaN decodes to black) nor empty."""
    return picture.size > 0 and float(picture.std()) > 1
