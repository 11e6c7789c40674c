"""The bench's results as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lib_hires.hosts.bench.compare_rows import ROWS
from lib_hires.hosts.bench.counter import wilson_interval
from lib_hires.hosts.bench.outcome import Enlarged, Outcome
from lib_hires.hosts.bench.paired import Interval, discordance, mean_difference, statistic_difference

Outcomes = Mapping[str, Outcome]
PairedNumbers = Mapping[str, Mapping[str, Any]]
_SMALL = "native"  # the row whose pictures the larger ones are held against


def table(outcomes: Outcomes) -> str:
    """Errors with Wilson 95 % intervals, objects, colours, processor seconds and UNet calls per picture."""
    head = f"{'':38} {'size':>9} {'wrong':>9} {'rate':>6}  {'95 % interval':14} {'objects':>7} "
    head += f"{'satur.':>6} {'clipped':>7} {'s/picture':>9} {'UNet calls':>10}"
    return "\n".join([head, *(_line(name, outcome) for name, outcome in outcomes.items())])


def _line(name: str, outcome: Outcome) -> str:
    row, n = ROWS[name], len(outcome.counts)
    mean = sum(outcome.counts.values()) / n
    return (
        f"{row.title:38} {f'{row.width}x{row.height}':>9} {f'{outcome.errors}/{n}':>9} {outcome.errors / n:6.1%}  "
        f"{_wilson(outcome.errors, n):14} {mean:7.2f} {outcome.saturation:6.3f} {outcome.clipped:7.1%} "
        f"{outcome.seconds / n:9.2f} {outcome.unet_calls / n:10.1f}"
    )


def _wilson(errors: int, n: int) -> str:
    low, high = wilson_interval(errors, n)
    return f"{low:.1%} - {high:.1%}"


def enlarged(outcomes: Outcomes) -> dict[str, Enlarged]:
    """The rows above native size; none where no row has a hires pass, or the native pictures were not drawn."""
    small = outcomes.get(_SMALL)
    if small is None or not any(ROWS[name].hires_scale > 1 for name in outcomes):
        return {}
    of_native = ROWS[_SMALL].width * ROWS[_SMALL].height
    return {n: Enlarged(o, small) for n, o in outcomes.items() if ROWS[n].width * ROWS[n].height > of_native}


def hires_table(outcomes: Outcomes) -> str:
    """What large pictures show: see `hires_numbers`."""
    head = f"{'':38} {'wrong, right before':>19}  {'95 % interval':14} {'as asked':>8} {'PSNR to small':>13} "
    lines = [head + f"{'spectrum':>8} {'high band':>9} {'grain':>5} {'work':>5}"]
    for name, n in hires_numbers(outcomes).items():
        errors, right = int(n["errors_from_right"]), int(n["right_before"])
        lines.append(
            f"{ROWS[name].title:38} {f'{errors}/{right}':>19}  {_wilson(errors, right):14} {n['as_asked']:8.1%} "
            f"{n['psnr']:10.1f} dB {n['spectrum']:5.2f} dB {n['high_band']:9.2f} {n['grain']:5.2f} {n['work']:5.2f}"
        )
    return "\n".join(lines)


def hires_numbers(outcomes: Outcomes) -> dict[str, dict[str, float]]:
    """By row: errors where the small picture was right, shape and colour as asked, median PSNR to the small picture,
    distance of the mean spectrum to that of true renders, energy above what the small size can hold relative to
    theirs, grain of plain areas in grey levels, and UNet operations relative to sampling at the size directly.
    """
    return {
        name: {
            "errors_from_right": int((large.wrong & large.right_before).sum()),
            "right_before": int(large.right_before.sum()),
            "as_asked": float(large.drawn_as_asked.mean()),
            "psnr": float(np.median(large.psnr)),
            "spectrum": large.detail(),
            "high_band": large.high_band,
            "grain": float(large.grain.mean()),
            "work": _work(name, outcomes),
        }
        for name, large in enlarged(outcomes).items()
    }


def _work(name: str, outcomes: Outcomes) -> float:
    direct = outcomes.get(ROWS[name].direct or name)
    return outcomes[name].operations_per_picture / direct.operations_per_picture if direct else float("nan")


def paired_table(numbers: PairedNumbers) -> str:
    """Every row against the one it is compared with, over the same prompts and seeds."""
    against = dict.fromkeys(ROWS[ROWS[name].against].title for name in numbers)
    head = f"{'':38} {'only here wrong':>15} {'only there':>10} {'p':>7}  {'PSNR, dB':22} "
    lines = [
        f"Against {', '.join(against)}, paired: p by McNemar's exact test, differences with bootstrap 95 % intervals",
        head + f"{'spectrum, dB':24} grain, grey levels",
    ]
    lines += [
        f"{ROWS[name].title:38} {n['only_here']:15d} {n['only_there']:10d} {n['p']:7.4f}  "
        f"{_difference(n['psnr'], 1):22} {_difference(n['spectrum'], 2):24} {_difference(n['grain'], 2)}"
        for name, n in numbers.items()
    ]
    return "\n".join(lines)


def _difference(interval: Interval, digits: int) -> str:
    value, low, high = interval
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def paired_numbers(outcomes: Outcomes) -> PairedNumbers:
    """By row, where the row that it is compared with was drawn as well. Takes seconds: thousands of resamples."""
    large = enlarged(outcomes)
    against = {name: ROWS[name].against for name in large}
    pairs = {name: other for name, other in against.items() if other in large and other != name}
    return {name: dict(_compared(large[name], large[other])) for name, other in pairs.items()}


def _compared(here: Enlarged, there: Enlarged) -> Iterator[tuple[str, Any]]:
    changed = discordance(here.wrong, there.wrong)
    yield "only_here", changed.only_here
    yield "only_there", changed.only_there
    yield "p", changed.p
    yield "psnr", mean_difference(here.psnr, there.psnr)
    yield "spectrum", statistic_difference(len(here.indices), here.detail, there.detail)
    yield "grain", mean_difference(here.grain, there.grain)


def as_json(outcomes: Outcomes, settings: Mapping[str, Any], paired: PairedNumbers) -> str:
    hires = hires_numbers(outcomes)
    rows = {
        name: _row(name, outcome) | {"hires": hires.get(name), "paired": paired.get(name)}
        for name, outcome in outcomes.items()
    }
    return json.dumps({"settings": settings, "rows": rows}, indent=1)


def _row(name: str, outcome: Outcome) -> dict[str, Any]:
    row, n = ROWS[name], len(outcome.counts)
    return {
        "title": row.title,
        "size": [row.width, row.height],
        "recipe": row.recipe,
        "presets": dict(row.presets),
        "changes": row.changes,
        "errors": outcome.errors,
        "pictures": n,
        "interval": wilson_interval(outcome.errors, n),
        "cfg_scale": row.cfg_scale,
        "saturation": outcome.saturation,
        "clipped": outcome.clipped,
        "counts": [outcome.counts[index] for index in sorted(outcome.counts)],
        "seconds_per_picture": outcome.seconds / n,
        "unet_calls_per_picture": outcome.unet_calls / n,
        "operations_per_picture": outcome.operations_per_picture,
        "hires_scale": row.hires_scale,
        "hires_denoise": row.hires_denoise,
    }
