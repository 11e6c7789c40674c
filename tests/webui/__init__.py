"""End-to-end tests against a running WebUI; see docs/testing.md."""
