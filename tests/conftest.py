"""Threads off before torch is imported: on small machines torch's threads spin against each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from hypothesis import settings

# No deadline: the machines are shared. Derandomised: a run that was green stays green until the code changes.
settings.register_profile("project", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("project")
