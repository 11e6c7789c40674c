"""Hosts: what runs the model. Each adapter offers the sites of lib_hires.sites and knows no technique by name."""
