"""One writer a run: the living are respected, the dead are not waited for, and who was overtaken notices."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from curation import lease as lease_module
from curation.errors import LeaseError
from curation.store import Run

HOLD = """
import sys, time
from curation.store import Run
with Run(sys.argv[1]).lease():
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["local", "memory"])
def run(request, tmp_path):
    return Run(tmp_path / "run" if request.param == "local" else f"memory://lease-{tmp_path.name}")


@pytest.fixture
def holder(tmp_path):
    """A living process that holds the lease of ``tmp_path/run``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def written(run, **changes):
    """Write a lease as another process would have."""
    held = {"token": "other", "host": "elsewhere", "pid": 1, "started": "1", "expires": time.time() + 60}
    run.write_bytes("lease.json", json.dumps(held | changes).encode())


def test_a_second_writer_is_refused_with_host_and_process(run):
    with run.lease(), pytest.raises(LeaseError, match=rf"{socket.gethostname()} process {os.getpid()};"), run.lease():
        pass


def test_a_lease_is_gone_when_its_holder_is_done_or_has_failed(run):
    with run.lease():
        assert run.exists("lease.json")
    assert not run.exists("lease.json")
    with pytest.raises(RuntimeError), run.lease():
        raise RuntimeError

    assert not run.exists("lease.json")


def test_another_living_process_is_respected(holder, tmp_path):
    with pytest.raises(LeaseError, match=f"process {holder.pid};"), Run(tmp_path / "run").lease():
        pass


def test_the_lease_of_a_killed_process_is_taken_at_once(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    run = Run(tmp_path / "run")
    assert run.exists("lease.json")
    start = time.monotonic()

    with run.lease():
        pass

    assert time.monotonic() - start < 5


def test_a_killed_process_that_nobody_has_waited_for_counts_as_dead(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # a zombie

    with Run(tmp_path / "run").lease():
        pass


def test_a_process_id_that_came_again_does_not_hold_the_lease_of_a_dead_one(run):
    written(run, host=socket.gethostname(), pid=os.getpid(), started="another time")

    with run.lease():
        pass


def test_the_lease_of_another_host_is_respected_until_it_ends(run):
    written(run)
    with pytest.raises(LeaseError, match="elsewhere process 1;"), run.lease():
        pass
    written(run, expires=time.time() - 1)

    with run.lease():
        assert json.loads(run.read_bytes("lease.json"))["host"] == socket.gethostname()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"expires": "soon"}', b"\xff"])
def test_a_broken_lease_locks_nobody_out(run, content):
    run.write_bytes("lease.json", content)

    with run.lease():
        pass


def test_of_many_that_come_at_the_same_time_at_most_one_goes_on(run):
    together = threading.Barrier(8)
    inside, refused = [], []

    def come() -> None:
        together.wait()
        try:
            with run.lease():
                inside.append(threading.get_ident())
                time.sleep(0.3)
        except LeaseError:
            refused.append(threading.get_ident())

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(inside) == 1
    assert len(refused) == 7


def test_the_holder_renews_its_lease(run, monkeypatch):
    monkeypatch.setattr(lease_module, "_RENEW_S", 0.02)
    with run.lease():
        first = json.loads(run.read_bytes("lease.json"))["expires"]
        time.sleep(0.2)

        assert json.loads(run.read_bytes("lease.json"))["expires"] > first


def test_a_lease_taken_over_is_noticed_and_left_to_its_new_holder(run, monkeypatch):
    monkeypatch.setattr(lease_module, "_RENEW_S", 0.02)
    with run.lease() as lease:
        assert not lease.lost.is_set()
        written(run)

        assert lease.lost.wait(5)

    assert json.loads(run.read_bytes("lease.json"))["token"] == "other"  # noqa: S105


def test_a_full_disk_does_not_end_the_renewals(small_disk, fill, monkeypatch):
    monkeypatch.setattr(lease_module, "_RENEW_S", 0.02)
    run = Run(small_disk / "run")
    with run.lease() as lease:
        filler = fill(small_disk)
        time.sleep(0.2)
        full = json.loads(run.read_bytes("lease.json"))["expires"]
        filler.unlink()
        time.sleep(0.2)

        assert json.loads(run.read_bytes("lease.json"))["expires"] > full
        assert not lease.lost.is_set()
