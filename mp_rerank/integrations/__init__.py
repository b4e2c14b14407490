"""Adapters for other people's frameworks: one module each, imported by its name and by nothing else here."""
