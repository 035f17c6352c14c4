"""WorldLM in JAX: language models trained over federations of federations."""

__version__ = "0.1.0"
