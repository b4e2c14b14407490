"""Other runtimes that compute a model's network: one module for each, imported where it is asked for. See ``base``."""
