"""What a WebUI's user meets: accordions, infotext, presets, plots and X/Y/Z axes, all derived from the declarations."""
