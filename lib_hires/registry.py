"""The list of techniques. A new technique is one file and one line here.

The order is the order in the panel, in the positional API list (append only) and in which patches act on a shared
site. For guidance it is: changes of the predictions before they are mixed (TCFG, FreSca, APG), maps of the mixed result
(RescaleCFG to Mahiro), what further predictions add (PAG, SAG), then what holds a reference (mixing, low-band lock).
"""

from __future__ import annotations

from lib_hires.technique import Technique
from lib_hires.techniques.attention import near_sighted_attention, near_sighted_tile, scale_fusion, slothful
from lib_hires.techniques.guidance import apg, cfg_norm, fresca, mahiro, pag, renorm_cfg, rescale_cfg, sag, tcfg
from lib_hires.techniques.hires import cascade, iterative_mixing, low_band_lock, relay
from lib_hires.techniques.inpaint import differential_diffusion
from lib_hires.techniques.schedule import model_sampling
from lib_hires.techniques.unet import deep_shrink, dilation, freeu

TECHNIQUES: tuple[Technique, ...] = (
    deep_shrink.TECHNIQUE,
    tcfg.TECHNIQUE,
    fresca.TECHNIQUE,
    apg.TECHNIQUE,
    rescale_cfg.TECHNIQUE,
    renorm_cfg.TECHNIQUE,
    cfg_norm.TECHNIQUE,
    mahiro.TECHNIQUE,
    pag.TECHNIQUE,
    sag.TECHNIQUE,
    dilation.TECHNIQUE,
    freeu.TECHNIQUE,
    scale_fusion.TECHNIQUE,
    near_sighted_tile.TECHNIQUE,
    near_sighted_attention.TECHNIQUE,
    slothful.TECHNIQUE,
    iterative_mixing.TECHNIQUE,
    low_band_lock.TECHNIQUE,
    cascade.TECHNIQUE,
    relay.TECHNIQUE,
    model_sampling.TECHNIQUE,
    differential_diffusion.TECHNIQUE,
)

BY_NAME: dict[str, Technique] = {technique.name: technique for technique in TECHNIQUES}
