"""The parts of tools/gpu.py: each is a function of a report and the settings, run in a process of
its own."""
