"""A model changed for its speed must score as before, or be as before."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

__all__ = ["keep_if_equal"]

logger = logging.getLogger(__name__)

Predict = Callable[[], npt.NDArray[np.float32]]

# Largest difference of a score, absolute and relative: sums in another order differ in their last bits.
TOLERANCE = {"float32": 1e-5, "float64": 1e-5}
TOLERANCE_16_BITS = 0.03


def keep_if_equal(
    what: str, change: Callable[[], object], undo: Callable[[], object], predict: Predict, dtype: str
) -> bool:
    """Do ``change``, and ``undo`` it where the model then scores otherwise, or where anything is raised.

    Args:
        what: the change, for the log.
        predict: what the model makes of some fixed pairs.
        dtype: of the model's weights.

    Returns:
        Whether it is kept.
    """
    tolerance = TOLERANCE.get(dtype, TOLERANCE_16_BITS)
    try:
        before = predict()
        change()
        after = predict()
        if np.allclose(before, after, rtol=tolerance, atol=tolerance):
            return True
        logger.debug("%s: it would score %s, not %s", what, after, before)
    except Exception as error:  # an operator that this build of torch lacks, a module of another make
        logger.debug("%s: it cannot be done here: %s", what, error)
    undo()
    return False
