"""Adapters for other frameworks, one module each. Nothing else in this package imports them."""
