"""Make empty integer programs for CBC, the solver that comes with python-mip.

The first program loads CBC. Most plans need no program, and some machines cannot load CBC's library.
"""

import logging
import os
from functools import cache

import mip


class SolverError(OSError):
    """CBC's library cannot be loaded."""


def new_model(purpose: str) -> mip.Model:
    """Return an empty program for CBC, without log output. The error names the program by its `purpose`.

    Raises SolverError if CBC's library cannot be loaded.
    """
    if reason := _why_not_loaded():
        raise SolverError(
            f"{purpose} needs the solver CBC, but its library cannot be loaded: {reason}. Install the libraries that "
            "CBC needs (often libgfortran), or set PMIP_CBC_LIBRARY to a libCbc of this machine"
        )
    model = mip.Model(solver_name=mip.CBC)
    model.verbose = 0
    return model


@cache
def _why_not_loaded() -> str:
    """Return the reason why CBC's library cannot be loaded; empty if it is loaded."""
    logger, messages, folder = logging.getLogger("mip.cbc"), [], os.getcwd()

    def keep(record: logging.LogRecord) -> bool:
        messages.append(" ".join(record.getMessage().split()))
        return False

    logger.addFilter(keep)
    try:
        import mip.cbc
    finally:
        logger.removeFilter(keep)
        os.chdir(folder)  # mip leaves the process in the library's folder if loading fails
    if not mip.cbc.has_cbc:
        return messages[-1].partition("library: ")[2] if messages else "python-mip does not say why"
    # cffi creates each function at the first use, under a lock. The garbage collector may delete a model while cffi
    # holds this lock, so cffi must already have created the function that deletes models.
    _ = mip.cbc.cbclib.Cbc_deleteModel
    return ""
