"""The fake models and the Dask clusters of `tests/`, for commands whose figures do not depend on a model.

A worker imports a loader by the name of its module and gets this process's search path. So this module adds the tests'
folder to the search path.
"""

import sys

from bench import ROOT

__all__ = ["CLUSTER_MARK", "EMPTY", "GATED", "IMPORTS", "PACED", "SLEEPING", "Processes", "score_of", "workers_of"]

TESTS = str(ROOT / "tests")
if TESTS not in sys.path:
    sys.path.append(TESTS)

from clusters import CLUSTER_MARK, Processes, workers_of  # noqa: E402
from fakes import score_of  # noqa: E402

#: scores of 0, at once
EMPTY = "fakes:load_empty"
#: scores of 0, after some seconds for each call
SLEEPING = "fakes:load_sleeping"
#: scores of 0, when a file is no longer there
GATED = "fakes:load_gated"
#: scores of 0, in a worker that has imported what a real model needs
IMPORTS = "fakes:load_imports"
#: scores by hash, after some seconds for each token; obeys orders in documents
PACED = "fakes:load_paced"
