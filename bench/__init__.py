"""Measurements of the package, and the making of its built-in model. Nothing here is imported by `mp_rerank`."""
