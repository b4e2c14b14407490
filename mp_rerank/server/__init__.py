"""``mp-rerank serve``: pools for every process and language, by the HTTP dialects that rerankers' clients speak.

    run.py          the process: uvicorn, signals, from loading to the last answer
    config.py       what an operator says
    app.py          which path is whose
    exchange.py     one request, from its headers to its answer: who asks, how much, in time, and still there
    dialects/       what a body means, and how an answer or an error is said: one module a dialect
    fields.py       a body's fields: checked, and described in OpenAPI
    refusals.py     why a request is refused, before a dialect puts it into words
    keys.py         API keys
    limits.py       bounds
    models.py       the models that are served: pools by name
    scoring.py      a job of a dialect, scored by a pool
    live.py         the last minute, and the state of everything, as JSON
    metrics.py      the same for Prometheus
    openapi.py      the description of it all
    page.py         the page at ``/``

Needs the extra ``serve``. The process imports no torch: workers do.
"""
