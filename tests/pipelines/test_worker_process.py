"""Workers are forked from a process that has imported what they need."""

import os
import subprocess
import sys
import time

import pytest

from curation.config import RunConfig
from curation.errors import StageError
from curation.pipelines.context import Context
from curation.pipelines.lvd142m import build_plan
from curation.pipelines.process_runner import ProcessRunner
from curation.pipelines.units import Unit
from curation.processes import start_time
from curation.store import Run

# Without `if __name__ == "__main__"`, as people write scripts.
SPAWN = """
import sys
from curation.pipelines.worker_process import Spawner

spawner = Spawner()
worker = spawner.spawn(sys.argv[1], "{}", "")
print(worker.process.pid, flush=True)
sys.stdin.read()
"""

LEAVE = """
import sys
from curation.pipelines.units import Unit
from curation.pipelines.worker_process import Spawner

if __name__ == "__main__":
    spawner = Spawner()
    worker = spawner.spawn(sys.argv[1], "{}", "")
    worker.pipe.send((Unit("fetch", "pool", None, {}), 1))
    worker.pipe.close()
    worker.process.join()
    print(worker.process.exitcode)
"""


def test_a_worker_ends_when_the_process_that_wanted_it_is_killed(tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(SPAWN)
    command = [sys.executable, script, str(tmp_path / "run")]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    worker = int(parent.stdout.readline())
    assert start_time(worker) is not None

    parent.kill()
    parent.communicate()

    deadline = time.monotonic() + 20
    while start_time(worker) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert start_time(worker) is None


def test_a_worker_that_is_killed_while_it_has_nothing_to_do_is_replaced(tmp_path):
    config = RunConfig.model_validate({})
    context, plan, runner = Context(Run(tmp_path), config), build_plan(config), ProcessRunner(1)
    try:
        for _ in range(2):
            with pytest.raises(StageError, match="was given none"):  # said by a worker
                list(runner.run(context, plan, plan.step("fetch"), [Unit("fetch", "pool", None, {})]))
            process = runner._workers[0].process
            process.kill()
            process.join()
    finally:
        runner.close()


def test_what_lies_in_the_current_folder_is_not_imported(tmp_path):
    for name in ("numpy.py", "yaml.py", "PIL.py"):
        (tmp_path / name).write_text("raise SystemExit('this is not a library')")
    (tmp_path / "urls.txt").write_text("https://h.example/a.jpg\n")
    (tmp_path / "my.yaml").write_text("pool: {inputs: [{kind: urls, path: urls.txt}]}")
    curate = tmp_path / "bin" / "curate"
    curate.parent.mkdir()
    curate.write_text("from curation.cli import entry\n\nif __name__ == '__main__':\n    entry()\n")

    done = subprocess.run(
        [sys.executable, curate, "run", "--config", "my.yaml", "--run", "run", "--stage", "crawl"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert "not a library" not in done.stderr


def test_a_worker_that_nobody_listens_to_any_more_ends_without_a_word(tmp_path):
    script = tmp_path / "leave.py"
    script.write_text(LEAVE)

    done = subprocess.run([sys.executable, script, str(tmp_path / "run")], capture_output=True, text=True, timeout=60)

    assert (done.stdout, done.stderr) == ("0\n", "")


def test_a_run_needs_neither_open_streams_nor_a_short_folder_for_temporary_files(tmp_path):
    (tmp_path / "urls.txt").write_text("https://h.example/a.jpg\n")
    (tmp_path / "my.yaml").write_text(f"pool: {{inputs: [{{kind: urls, path: {tmp_path}/urls.txt}}]}}")
    temporary = tmp_path / ("long" * 30)
    temporary.mkdir()
    command = [sys.executable, "-m", "curation.cli", "run", "--config", str(tmp_path / "my.yaml")]
    command += ["--run", str(tmp_path / "run"), "--stage", "crawl"]

    closed = subprocess.run(
        ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command], env=os.environ | {"TMPDIR": str(temporary)}, timeout=60
    )

    assert closed.returncode == 0
    assert Run(tmp_path / "run").read_table("pool", "crawl", 0).num_rows == 1
    assert not list(temporary.glob("pymp-*"))
