"""What a process of ours is without."""

import subprocess
import sys

IMPORTED_AND_ASKED_FOR = """
from curation.processes import leave_pandas_out
leave_pandas_out()
import pyarrow, sys, torch
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # asks where pandas is; an error here ended every training
pyarrow.array([1, 2])  # imports it
print("pandas" in sys.modules)
"""


def test_pandas_is_left_out_and_who_asks_for_it_goes_on():
    code = [sys.executable, "-c", IMPORTED_AND_ASKED_FOR]
    done = subprocess.run(code, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "False\n", done.stderr
