"""What every worker needs, imported once by the process that workers are forked from; see ``worker_process.py``.

Only what puts no threads to work: torch and ONNX Runtime are imported by the worker whose step wants them.
"""

import atexit
import gc
import os
import sys

from curation.processes import leave_pandas_out

leave_pandas_out()

import curation.crawl.fetcher  # noqa: E402
import curation.pipelines.lvd142m  # noqa: E402
import curation.pipelines.work  # noqa: E402, F401

if any("multiprocessing.forkserver" in word for word in sys.orig_argv):
    gc.freeze()  # workers need not look through all this again, and the memory stays shared
    # It holds nothing, and whoever reads the command's output waits for its end: a fifth of a second without this.
    atexit.register(os._exit, 0)
