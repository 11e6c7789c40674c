"""The parameter table of the documentation, written from the declarations.

./dev python -m lib_hires.parameter_table     rewrites the table in README.md
"""

from __future__ import annotations

from pathlib import Path

from lib_hires.registry import TECHNIQUES
from lib_hires.settings import changed_fields, params_of
from lib_hires.technique import Technique

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- parameters: written by lib_hires.parameter_table -->", "<!-- end of parameters -->"


def markdown() -> str:
    """All techniques with their parameters and presets."""
    return "\n\n".join(_technique(technique) for technique in TECHNIQUES)


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


def with_table(text: str) -> str:
    """`text` with everything between the two markers replaced by the current table."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{markdown()}\n\n{END}{after}"


def main() -> None:
    README.write_text(with_table(README.read_text()))


if __name__ == "__main__":
    main()
