"""A real hub on loopback: the client's own requests, a tiny model, its card."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from curation.config.selection import EmbedConfig
from curation.errors import WeightsError
from curation.models import torchvision_shim
from curation.models.encoder import ImageEncoder
from curation.models.hub import is_non_commercial, license_in_card, published
from curation.models.weights import resolve

torch = pytest.importorskip("torch")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self):
        self._answer(False)

    def do_GET(self):
        self._answer(True)

    def _answer(self, with_body):
        self.asked.append(self.path)
        body = self.files.get(self.path.rpartition("/")[2])
        found = body is not None and self.path.startswith("/lab/tiny/resolve/")
        self.send_response(200 if found else 404)
        if not found:
            body = b""
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def model_files():
    torchvision_shim.prepare()
    import timm
    from safetensors.torch import save

    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0)
    config = {
        "architecture": "test_vit",
        "num_classes": 0,
        "pretrained_cfg": {"input_size": [3, 160, 160], "num_classes": 0, "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    return {"config.json": json.dumps(config).encode(), "model.safetensors": save(state)}


@pytest.fixture
def hub(model_files):
    handler = type("Hub", (_Hub,), {"files": dict(model_files), "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        handler.url = f"http://127.0.0.1:{running.server_port}"
        yield handler
        running.shutdown()
        thread.join()


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    """The hub's client of this process, pointed at the loopback hub and at an empty cache."""
    from huggingface_hub import constants

    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("CURATION_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return hub


def test_a_model_of_a_hub_loads_and_offline_it_loads_from_the_cache(client, monkeypatch):
    client.files["README.md"] = b"---\nlicense: apache-2.0\ntags: [timm]\n---\n# Tiny\n"

    config = EmbedConfig(model="hf-hub:lab/tiny", weights="hub", batch_size=1, side_px=160)
    weights = resolve("hf-hub:lab/tiny")
    first = ImageEncoder(config, weights)
    asked = len(client.asked)
    monkeypatch.setenv("CURATION_OFFLINE", "1")
    offline = ImageEncoder(config, resolve("hf-hub:lab/tiny"))

    assert (first.license, first.dim) == ("apache-2.0", 64)
    assert offline.identity == first.identity
    assert weights.sha256 == hashlib.sha256(client.files["model.safetensors"]).hexdigest()
    assert len(client.asked) == asked > 0


def test_a_licence_decides_before_any_weights_are_read(client):
    client.files["README.md"] = b"---\nlicense: cc-by-nc-4.0\n---\n"
    with pytest.raises(WeightsError, match=r"non-commercial licence cc-by-nc-4\.0"):
        published("hf-hub:lab/tiny", [])
    assert not any("safetensors" in path or ".bin" in path for path in client.asked)

    assert published("hf-hub:lab/tiny", ["CC-BY-NC-4.0"]).license == "cc-by-nc-4.0"


def test_a_licence_that_is_stated_nowhere_is_refused_until_accepted(client):
    with pytest.raises(WeightsError, match="states no licence"):
        published("hf-hub:lab/tiny", [])

    assert published("hf-hub:lab/tiny", ["unknown"]).license == "unknown"


def test_offline_without_a_cached_model_is_a_clear_error(client, monkeypatch):
    monkeypatch.setenv("CURATION_OFFLINE", "1")

    with pytest.raises(WeightsError, match=r"hf-hub:lab/tiny.*CURATION_OFFLINE=1 forbids to download"):
        published("hf-hub:lab/tiny", [])
    assert client.asked == []


def test_a_repository_of_something_else_is_a_clear_error(client):
    client.files["README.md"] = b"---\nlicense: mit\n---\n"
    client.files["model.safetensors"] = b"\x80\x04not tensors"
    with pytest.raises(WeightsError, match="cannot be read as tensors"):
        ImageEncoder(EmbedConfig(model="hf-hub:lab/tiny", weights="hub"), published("hf-hub:lab/tiny", []))
    with pytest.raises(WeightsError, match="no weights from the hub"):
        published("hf-hub:lab/other", [])
    with pytest.raises(WeightsError, match="write hf-hub:organisation/name"):
        published("hf-hub:../../etc", [])


def test_an_architecture_that_timm_does_not_know_is_a_clear_error(client):
    client.files["config.json"] = b'{"architecture": "no_such_network", "pretrained_cfg": {}}'

    with pytest.raises(WeightsError, match="does not know its architecture"):
        published("hf-hub:lab/tiny", [])


def test_the_clients_own_variables_lead_to_the_hub(hub, tmp_path):
    hub.files["README.md"] = b"---\nlicense: mit\n---\n"
    script = "from curation.models.hub import published; print(published('hf-hub:lab/tiny', []).license)"
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    kept |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=False, env=kept
    )

    assert done.returncode == 0, done.stderr
    assert "mit" in done.stdout.split()


def test_an_agreement_is_refused_until_somebody_has_named_it(client):
    client.files["README.md"] = b"---\nlicense: other\nlicense_name: dinov3-license\n---\n"
    with pytest.raises(WeightsError, match="dinov3-license is an agreement"):
        published("hf-hub:lab/tiny", [])

    assert published("hf-hub:lab/tiny", ["DINOv3-license"]).license == "dinov3-license"


def test_a_url_only_model_is_not_downloaded_offline(tmp_path, monkeypatch):
    torchvision_shim.prepare()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("CURATION_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    with pytest.raises(WeightsError, match="CURATION_OFFLINE=1 forbids"):
        published("timm:vit_huge_patch16_gap_448.in1k_ijepa", ["cc-by-nc-4.0"])


@pytest.mark.parametrize(
    ("license_id", "expected"),
    [
        ("cc-by-nc-4.0", True),
        ("CC-BY-NC-SA-4.0", True),
        ("fair-noncommercial-research-license", True),
        ("apple-amlr-research", True),
        ("apache-2.0", False),
        ("mit", False),
        ("cc-by-4.0", False),
        ("ncsa", False),
    ],
)
def test_a_licence_that_is_not_for_commerce_is_known_by_its_name(license_id, expected):
    assert is_non_commercial(license_id) is expected


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\ntext", "mit"),
        ("---\r\nlicense: other\r\nlicense_name: my-research\r\n---\r\n", "my-research"),
        ("---\nlicense: [a, b]\n---\n", ""),
        ("---\n- a\n---\n", ""),
        ("---\n{: broken\n---\n", ""),
        ("license: mit", ""),
        ("---\nlicense: !!python/object/apply:os.system ['true']\n---\n", ""),
    ],
)
def test_the_licence_of_a_card_is_read_as_plain_data(card, expected):
    assert license_in_card(card) == expected
