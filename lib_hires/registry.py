"""The list of techniques. A new technique is one file and one line here.

The order is the order in the panel, in the positional API list (append only) and in which patches act on a shared site.
"""

from __future__ import annotations

from lib_hires.technique import Technique
from lib_hires.techniques.unet import deep_shrink

TECHNIQUES: tuple[Technique, ...] = (deep_shrink.TECHNIQUE,)

BY_NAME: dict[str, Technique] = {technique.name: technique for technique in TECHNIQUES}
