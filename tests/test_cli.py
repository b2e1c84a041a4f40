"""``curate``: exit codes, one line for what goes wrong, and an answer at once for who only asks."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml
from PIL import Image

from curation import __version__
from curation.cli import main
from curation.config import RunConfig
from curation.settings import parse
from curation.store import Run

COMMANDS = {
    "run": ["--config", "--run", "--stage", "--only", "--redo", "--yes", "--refit", "--runner", "--ray-address",
            "--workers", "--set"],
    "status": ["--run", "--json"],
    "report": ["--run"],
    "config": ["--config", "--set"],
    "models": [],
    "train": ["--manifest", "--config", "--output", "--resume", "--device", "--workers", "--ray-address", "--set"],
    "export-model": ["--run", "--format", "--output", "--image-px", "--network"],
    "evaluate": ["--run", "--backbone", "--data", "--test", "--tasks", "--output", "--network", "--device",
                 "--accept-license", "--set"],
    "demo": ["--folder", "--port", "--workers"],
    "calibrate": ["--run", "--config", "--images", "--size", "--precision", "--pool-size", "--seed", "--output",
                  "--set"],
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    """Settings of a run of thirty small images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(30):
        buffer = io.BytesIO()
        Image.linear_gradient("L").resize((64, 64)).rotate(12 * index).convert("RGB").save(buffer, "JPEG")
        (folder / f"{index:02d}.jpg").write_bytes(buffer.getvalue())
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump({"pool": {"inputs": [{"kind": "folder", "path": str(folder)}]}, "shards": {"rows": 10}})
    )
    return path


def curate(*arguments):
    return [sys.executable, "-m", "curation.cli", *map(str, arguments)]


def test_importing_the_command_line_imports_nothing_heavy():
    heavy = {"torch", "faiss", "ray", "timm", "pyarrow", "numpy"}
    code = f"import sys, curation.cli; print(sorted({heavy} & set(sys.modules)))"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_names_its_options(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])

    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert all(option in said for option in COMMANDS[command])


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])

    said = capsys.readouterr().out
    assert all(command in said for command in COMMANDS)


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])

    assert caught.value.code == 0
    assert capsys.readouterr().out == f"curate {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["nosuch"], ["run", "--nosuch"], ["run", "--workers", "0"], ["status"]])
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)

    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_three_mistakes_in_the_settings_are_all_listed(tmp_path, capsys):
    path = tmp_path / "my.yaml"
    path.write_text("nsfw: {max_score: 50}\nfetch: {timeout: 3}\nshards: {rows: many}\n")

    assert main(["run", "--config", str(path), "--run", str(tmp_path / "run")]) == 2

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"curate: {path}: ") for line in lines)
    assert sorted(line.split(": ")[2] for line in lines) == ["fetch.timeout", "nsfw.max_score", "shards.rows"]
    assert not (tmp_path / "run").exists()


def test_an_unknown_stage_lists_the_stages(config, tmp_path, capsys):
    assert main(["run", "--config", str(config), "--run", str(tmp_path / "run"), "--stage", "nosuch"]) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert "crawl, fetch, pca_hash, nsfw, faces, sscd, dedup, embed, index, cluster, retrieve, manifest" in line


def broken_run(tmp_path, content):
    run = Run(tmp_path / "broken")
    run.write_bytes("run.yaml", content)
    return run.url


@pytest.mark.parametrize(
    ("code", "says", "arguments"),
    [
        (2, "give --run FOLDER", ["run"]),
        (2, "cannot be read", ["run", "--config", "/nowhere.yaml"]),
        (2, "is no run yet", ["run", "--run", "{tmp}/nothing"]),
        (2, "is no run yet", ["status", "--run", "{tmp}/nothing"]),
        (2, "is no run yet", ["report", "--run", "{tmp}/nothing"]),
        (2, "is not valid YAML", ["status", "--run", "{broken}"]),
        (2, "nosuch://x", ["status", "--run", "nosuch://x"]),
        (2, "add --yes to agree",
         ["run", "--config", "{config}", "--run", "{crawled}", "--stage", "crawl", "--redo", "crawl"]),
        (2, "there is no stage 'x'", ["run", "--config", "{config}", "--run", "{tmp}/run", "--redo", "x"]),
        (2, "comes after --stage crawl",
         ["run", "--config", "{config}", "--run", "{tmp}/run", "--stage", "crawl", "--redo", "dedup"]),
        (2, "nsfw.max_score", ["run", "--config", "{config}", "--run", "{tmp}/run", "--set", "nsfw.max_score=2"]),
        (2, "must look like section.key=value", ["config", "--config", "{config}", "--set", "nsfw"]),
        (2, "--only fetch: crawl is not finished",
         ["run", "--config", "{config}", "--run", "{tmp}/run", "--stage", "fetch", "--only"]),
        (1, "nosuch", ["run", "--config", "{config}", "--run", "{tmp}/run", "--set", "sscd.weights=nosuch"]),
        (1, "nowhere", ["run", "--config", "{config}", "--run", "{tmp}/run", "--stage", "crawl",
                        "--set", "pool.inputs.0.path=/nowhere"]),
        (1, "cannot be written", ["run", "--config", "{config}", "--run", "{config}", "--stage", "crawl"]),
        (1, "cannot be written", ["run", "--config", "{config}", "--run", "{config}/run", "--stage", "crawl"]),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_line_and_no_traceback(code, says, arguments, config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    places = {"tmp": tmp_path, "config": config, "broken": "", "crawled": tmp_path / "crawled"}
    if "{broken}" in arguments:
        places["broken"] = broken_run(tmp_path, b"pool: {inputs: [\x00")
    if "{crawled}" in arguments:
        assert main(["run", "--config", str(config), "--run", str(tmp_path / "crawled"), "--stage", "crawl"]) == 0
    capsys.readouterr()

    assert main([argument.format(**places) for argument in arguments]) == code

    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("curate: ")]
    assert len(said) == 1
    assert says in said[0]


def test_config_prints_what_loads_again(config, capsys):
    assert main(["config", "--config", str(config), "--set", "fetch.timeout_s=10"]) == 0

    printed = yaml.safe_load(capsys.readouterr().out)

    assert printed["fetch"]["timeout_s"] == 10
    assert printed["dedup"]["threshold"] == 0.6
    again = parse(RunConfig, printed, "printed.yaml")
    assert again.model_dump(mode="json") == printed


def test_status_of_a_run_that_has_only_begun(config, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["run", "--config", str(config), "--run", run, "--stage", "crawl"]) == 0
    capsys.readouterr()

    assert main(["status", "--run", run]) == 0
    assert "fetch" in capsys.readouterr().out
    assert main(["status", "--run", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_a_run_remembers_its_settings(config, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["run", "--config", str(config), "--run", run, "--stage", "crawl"]) == 0
    assert main(["run", "--run", run, "--stage", "fetch", "--set", "fetch.retries=3"]) == 0

    assert len(Run(run).markers("pool", "fetch")) == 3
    assert yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["fetch"]["retries"] == 3
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {event["event"] for event in events} >= {"start", "done", "end"}


def test_redo_says_what_it_costs(config, tmp_path, capsys):
    arguments = ["run", "--config", str(config), "--run", str(tmp_path / "run"), "--stage", "fetch"]
    assert main(arguments) == 0
    capsys.readouterr()

    assert main([*arguments, "--redo", "fetch", "--yes"]) == 0

    said = capsys.readouterr().err
    assert "fetch: 3 shards, 30 rows" in said
    assert "requests go to the hosts again" in said


def test_a_run_that_another_process_writes_is_refused(config, tmp_path, capsys):
    run = Run(tmp_path / "run")
    with run.lease():
        assert main(["run", "--config", str(config), "--run", run.url, "--stage", "crawl"]) == 1

    assert f"process {os.getpid()}" in capsys.readouterr().err


def test_ctrl_c_ends_with_130_and_the_next_run_finishes(config, tmp_path):
    run = tmp_path / "run"
    command = curate("run", "--config", config, "--run", run, "--stage", "nsfw", "--workers", "1")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if json.loads(line)["event"] == "start":
            break
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)

    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "the same command goes on" in said.splitlines()[-1]
    assert not (run / "lease.json").exists()
    assert main(list(map(str, command[3:]))) == 0
    assert len(Run(run).markers("pool", "nsfw")) == 3


def test_a_reader_that_goes_away_is_no_traceback(config):
    process = subprocess.Popen(
        curate("config", "--config", config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    said = process.stderr.read()
    process.wait(60)
    process.stderr.close()

    assert "Traceback" not in said


def test_help_answers_in_under_half_a_second():
    times = []
    for _ in range(3):
        start = time.monotonic()
        subprocess.run(curate("--help"), check=True, capture_output=True)
        times.append(time.monotonic() - start)

    assert min(times) < 0.5


def test_a_ray_cluster_that_is_not_there_is_an_error_at_once(tmp_path):
    (tmp_path / "urls.txt").write_text("https://h.example/a.jpg\n")
    (tmp_path / "my.yaml").write_text(f"pool: {{inputs: [{{kind: urls, path: {tmp_path}/urls.txt}}]}}")
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        address = f"ray://127.0.0.1:{nobody_listens.getsockname()[1]}"
        command = [sys.executable, "-m", "curation.cli", "run", "--config", str(tmp_path / "my.yaml")]

        done = subprocess.run(
            [*command, "--run", str(tmp_path / "run"), "--ray-address", address],
            capture_output=True,
            text=True,
            timeout=60,
        )

    assert done.returncode == 1
    assert f"no Ray cluster at {address}" in done.stderr
