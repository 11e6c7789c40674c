"""The parameter tables of the documentation, written from the declarations.

./dev python -m lib_hires.parameter_table     rewrites docs/parameters.md
"""

from __future__ import annotations

from pathlib import Path

from lib_hires.registry import TECHNIQUES
from lib_hires.settings import changed_fields, params_of
from lib_hires.technique import Technique

PAGE = Path(__file__).parent.parent / "docs" / "parameters.md"
HEAD = """# Parameters

Every technique with its settings and presets, written by `./dev python -m lib_hires.parameter_table` from the same
declarations that the panel, the API and the range checks come from.

Fractions (Start, End) count the pass that is being sampled: 0 is its first step, 1 its end. For a pass that starts at
full noise they mean the same as ComfyUI's percent, so values can be carried over.
"""


def page() -> str:
    """All techniques with their parameters and presets, by family."""
    parts = [HEAD]
    for family in dict.fromkeys(technique.family for technique in TECHNIQUES):
        parts.append(f"## {family}\n")
        parts += [f"{_technique(technique)}\n" for technique in TECHNIQUES if technique.family == family]
    return "\n".join(parts)


def _technique(technique: Technique) -> str:
    lines = [
        f"### {technique.title} (`{technique.name}`)",
        "",
        f"{technique.summary} Source: {technique.source}.",
        "",
        "| Setting | API key | Default | Accepts | What it does |",
        "|---|---|---|---|---|",
    ]
    for name, param in params_of(technique.settings).items():
        default = param.show(param.default) or "(empty)"
        lines.append(f"| {param.label} | `{name}` | {default} | {param.accepts} | {param.help} |")
    lines += ["", "| Preset | Differs from the defaults in |", "|---|---|"]
    for title, settings in technique.presets.items():
        changes = ", ".join(
            f"{params_of(settings)[k].label} {params_of(settings)[k].show(v)}"
            for k, v in changed_fields(settings).items()
        )
        lines.append(f"| {title} | {changes or 'nothing'} |")
    return "\n".join(lines)


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
