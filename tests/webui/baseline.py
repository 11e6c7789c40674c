"""Pictures of a WebUI without the extension, to compare a WebUI with it against, bit for bit.

    python -m tests.webui.baseline http://127.0.0.1:7861 DIRECTORY

Remove the extension, start the WebUI, run this; put the extension back, restart, and run the tests with
HIRES_BASELINE_DIR=DIRECTORY (docs/testing.md).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from .client import TITLE, Answer, WebUI

REQUESTS: dict[str, Callable[[WebUI], Answer]] = {
    "euler": lambda w: w.txt2img(),
    "sde karras": lambda w: w.txt2img(sampler_name="DPM++ SDE", scheduler="Karras", steps=3),
    "heun": lambda w: w.txt2img(sampler_name="Heun", steps=3),
    "ddim": lambda w: w.txt2img(sampler_name="DDIM", steps=3),
    "hires": lambda w: w.hires(),
    "img2img": lambda w: w.img2img(),
    "inpaint": lambda w: w.inpaint(),
    "batch": lambda w: w.txt2img(batch_size=2),
    "composed prompt": lambda w: w.txt2img(prompt="a lighthouse AND a red boat :0.7"),
    "odd size": lambda w: w.txt2img(width=264, height=168),
}


def baseline_file(directory: Path, host: str, name: str) -> Path:
    return directory / host / f"{name}.png"


def checkpoint_file(directory: Path, host: str) -> Path:
    return directory / host / "checkpoint.json"


def record(webui: WebUI, directory: Path) -> None:
    if webui.has_script(TITLE):
        sys.exit(f"{webui.url} still has the extension: remove it and restart first")
    title = webui.checkpoint("sd1")
    if title is None:
        sys.exit("no Stable Diffusion 1.5 checkpoint is installed")
    (directory / webui.host).mkdir(parents=True, exist_ok=True)
    checkpoint_file(directory, webui.host).write_text(json.dumps(title))
    with webui.using_checkpoint(title):
        for name, request in REQUESTS.items():
            answer = request(webui)
            assert answer.status == 200, answer.body
            stacked = np.concatenate(answer.pictures, axis=0)
            Image.fromarray(stacked).save(baseline_file(directory, webui.host, name))
            print(f"{webui.host}: {name}, {len(answer.pictures)} picture(s)")


if __name__ == "__main__":
    record(WebUI(sys.argv[1]), Path(sys.argv[2]))
