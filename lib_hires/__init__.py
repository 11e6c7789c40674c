"""Hires Plus: training-free high-resolution techniques for Stable Diffusion WebUI. See docs/architecture.md."""

__version__ = "0.1.0"
TITLE = "Hires Plus"
