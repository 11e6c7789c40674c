"""Nothing to install: torch, numpy and gradio come with the WebUI, and the plugin needs no more."""
