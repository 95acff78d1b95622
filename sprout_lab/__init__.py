"""A notebook-first lab for five families of small language models. Importing it alone loads no torch."""
__version__ = "0.1.0"
