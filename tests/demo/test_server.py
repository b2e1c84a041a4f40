import http.client
import socket
import threading
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest

from curation.demo.server import serve
from curation.errors import InputError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "www" / "deep").mkdir(parents=True)
    (tmp_path / "www" / "index.html").write_text("<p>hello")
    (tmp_path / "www" / "deep" / "a.jpg").write_bytes(b"jpeg")
    (tmp_path / "www" / "deep" / "a.webp").write_bytes(b"webp")
    (tmp_path / "www" / "robots.txt").write_text("User-agent: *\n")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "www" / "way-out").symlink_to(tmp_path)
    return tmp_path


def _get(base_url, path):
    """Send the path as it is; urllib would tidy it up."""
    connection = http.client.HTTPConnection(urlsplit(base_url).netloc, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type"), answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("path", "content_type", "body"),
    [
        ("/", "text/html; charset=utf-8", b"<p>hello"),
        ("/deep/a.jpg", "image/jpeg", b"jpeg"),
        ("/deep/a.webp?size=1#x", "image/webp", b"webp"),
        ("/robots.txt", "text/plain; charset=utf-8", b"User-agent: *\n"),
    ],
)
def test_files_are_served_with_their_type(folder, path, content_type, body):
    with serve(folder) as base_url:
        assert _get(base_url, path) == (200, content_type, body)


@pytest.mark.parametrize(
    "path",
    [
        "/nothing.jpg",
        "/deep/",
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/deep/../../secret.txt",
        "//../secret.txt",
        "/..%2fsecret.txt",
        "/way-out/secret.txt",
        "/a%00.jpg",
    ],
)
def test_what_is_not_in_the_site_is_not_found(folder, path):
    with serve(folder) as base_url:
        status, _, body = _get(base_url, path)

    assert status == 404
    assert b"secret" not in body.replace(b"secret.txt", b"")


def test_a_second_server_takes_the_same_port(folder):
    with serve(folder) as first:
        pass
    with serve(folder) as second:
        pass

    assert first == second


def test_a_taken_port_is_one_clear_error(folder):
    with socket.create_server(("127.0.0.1", 0)) as other:
        (folder / "port").write_text(str(other.getsockname()[1]))
        with pytest.raises(InputError, match=r"port .* cannot be had"), serve(folder):
            pass


@pytest.mark.parametrize("text", ["http", "0", "70000", "-1"])
def test_a_port_file_that_holds_no_port_is_refused(folder, text):
    (folder / "port").write_text(text)

    with pytest.raises(InputError, match="not a port number"), serve(folder):
        pass


def test_nothing_answers_after_the_block(folder):
    with serve(folder) as base_url:
        pass

    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(base_url, timeout=2)
    assert not [thread for thread in threading.enumerate() if thread.name == "demo-site"]


def test_many_clients_are_served_at_a_time(folder):
    answers = []
    with serve(folder) as base_url:
        clients = [threading.Thread(target=lambda: answers.append(_get(base_url, "/deep/a.jpg")[0])) for _ in range(32)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()

    assert answers == [200] * 32


def test_a_folder_without_a_site_is_refused(tmp_path):
    with pytest.raises(InputError, match="build the demo's website first"), serve(tmp_path):
        pass
