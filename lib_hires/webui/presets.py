"""The user's own presets: one JSON file, {technique name: {preset name: {field: value}}}."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from threading import RLock
from typing import Any

from lib_hires.request import ENABLED, PRESET, read_technique
from lib_hires.settings import Settings
from lib_hires.technique import Technique

log = logging.getLogger("hires_plus")

USER_FILE = Path(__file__).resolve().parents[2] / "user" / "presets.json"
LONGEST_NAME = 60

Stored = dict[str, dict[str, dict[str, Any]]]


class PresetError(ValueError):
    """Why a preset cannot be saved or deleted, in words for the user."""


class PresetStore:
    """Built-in and user presets. The file is read anew each time: it may be edited by hand, and it is tiny."""

    def __init__(self, path: Path = USER_FILE):
        self.path = path
        self._lock = RLock()
        self._told: set[str] = set()

    def all(self, technique: Technique) -> dict[str, Settings]:
        """Built-in presets, then the user's, by name."""
        return {**technique.presets, **self.of_user(technique)}

    def of_user(self, technique: Technique) -> dict[str, Settings]:
        """The user's presets; values that are out of range are repaired, unreadable presets left out."""
        presets = {}
        for name, values in self._load().get(technique.name, {}).items():
            settings, notes = read_technique(technique, {**values, ENABLED: True, PRESET: None})
            self._tell([f"Your preset {name!r}: {note}" for note in notes])
            if settings is not None and not _is_built_in(technique, name):
                presets[name] = settings
        return presets

    def save(self, technique: Technique, name: str, settings: Settings) -> str:
        """Store settings under a name; returns the name as stored."""
        name = " ".join(str(name or "").split())
        if not name:
            raise PresetError("a preset needs a name")
        if len(name) > LONGEST_NAME:
            raise PresetError(f"a name has at most {LONGEST_NAME} characters, this one has {len(name)}")
        if _is_built_in(technique, name):
            raise PresetError(f"{name!r} is a built-in preset: choose another name")
        with self._lock:
            stored = self._load()
            stored.setdefault(technique.name, {})[name] = asdict(settings)
            self._store(stored)
        return name

    def delete(self, technique: Technique, name: str) -> None:
        if _is_built_in(technique, str(name)):
            raise PresetError(f"{name!r} is a built-in preset and stays")
        with self._lock:
            stored = self._load()
            if stored.get(technique.name, {}).pop(name, None) is None:
                raise PresetError(f"there is no preset {name!r} of your own")
            self._store(stored)

    def _tell(self, notes: list[str]) -> None:
        for note in notes:
            if note not in self._told:  # the page reads presets at every change of a slider
                self._told.add(note)
                log.warning(note)

    def _load(self) -> Stored:
        with self._lock:
            try:
                stored = json.loads(self.path.read_text(encoding="utf-8"))
            except FileNotFoundError:
                return {}
            except OSError as error:
                log.warning(f"User presets cannot be read: {error}")
                return {}
            except (ValueError, RecursionError) as error:
                return self._set_aside(str(error))
            if not _has_form(stored):
                return self._set_aside("it is not {technique: {name: {setting: value}}}")
            return stored

    def _set_aside(self, reason: str) -> Stored:
        aside = self.path.with_suffix(".json.broken")
        try:
            os.replace(self.path, aside)
            log.error(f"User presets in {self.path} are damaged ({reason}); the file is kept as {aside.name}")
        except OSError as error:
            log.error(f"User presets in {self.path} are damaged ({reason}) and cannot be moved away: {error}")
        return {}

    def _store(self, stored: Stored) -> None:
        """Write beside the file, then swap: a crash leaves the old file or the new one, never half of one."""
        draft = self.path.with_suffix(".json.new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(stored, indent=2), encoding="utf-8")
            os.replace(draft, self.path)
        except OSError as error:
            raise PresetError(f"{self.path} cannot be written: {error}") from None


def matching_name(presets: Mapping[str, Settings], settings: Settings | None, preferred: Any = None) -> str | None:
    """The name of the preset that these settings are; `preferred` where several are."""
    names = [name for name, preset in presets.items() if preset == settings]
    return preferred if preferred in names else next(iter(names), None)


def _is_built_in(technique: Technique, name: str) -> bool:
    return name.lower() in (known.lower() for known in technique.presets)


def _has_form(stored: Any) -> bool:
    return isinstance(stored, dict) and all(
        isinstance(presets, dict) and all(isinstance(values, dict) for values in presets.values())
        for presets in stored.values()
    )
