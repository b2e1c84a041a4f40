"""What a weights file must not contain, looked at before anything loads it.

An ONNX model is data, yet it may name other files (external tensors, compiled contexts) and operators that only a
library outside of ONNX Runtime has. A TorchScript archive is a program: its pickles are read by an unpickler in C++
that makes tensors and script classes only, but its code runs, and ``torch.from_file`` writes files. PyTorch's own
security policy says to treat such a file as executable code. So a TorchScript file is loaded only by a pinned digest
or from a path that the user named, and, here, only if its code has none of the operators that reach files; this is
a second lock, no sandbox.
"""

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from curation.errors import WeightsError

# Field numbers of onnx.proto, which are fixed for good.
_MODEL_GRAPH, _MODEL_FUNCTIONS = 7, 25
_FUNCTION_NODES, _FUNCTION_DOMAIN = 7, 10
_GRAPH_NODES, _GRAPH_TENSORS, _GRAPH_SPARSE = 1, 5, 15
_NODE_OP, _NODE_ATTRIBUTES, _NODE_DOMAIN = 4, 5, 7
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSE = (5, 10), (6, 11), (22, 23)
_SPARSE_TENSORS = (1, 2)
# Of the operators in use; what a model merely imports (quantizers import all they know) does not matter.
_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"})
_FILE_OPERATORS = frozenset({"EPContext"})  # reads a compiled model from a path in the node
_MAX_DEPTH = 16

_MAX_CODE_BYTES = 64 << 20
# Texts and comments of TorchScript, which are Python's.
_STRING_OR_COMMENT = re.compile(
    r'"""(?:\\.|[^\\])*?"""|\'\'\'(?:\\.|[^\\])*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|#[^\n]*', re.DOTALL
)
_GAP = r"[\s\\]*"  # a backslash continues a line
_FILE_CALLS = re.compile(rf"\.{_GAP}(from_file|save|load)\b")
_OPERATOR_SPACES = re.compile(rf"\bops{_GAP}\.{_GAP}(\w+)")
_KNOWN_SPACES = frozenset({"aten", "prim", "quantized", "prepacked", "torchvision"})
# The modules of operators as values: given another name, or to ``getattr``.
_BARE_MODULE = re.compile(rf"(?<![\w.])(torch|ops{_GAP}\.{_GAP}\w+|ops)\b(?!{_GAP}\.)")


def check_onnx(data: bytes, path: Path) -> None:
    """Refuse an ONNX model that reaches out of its own file.

    Args:
        data: The whole file.
        path: For messages.

    Raises:
        WeightsError: External tensors, operators of unknown domains or that name files, or no ONNX model at all.
    """
    try:
        _check_model(memoryview(data))
    except _Malformed as error:
        raise WeightsError(f"weights {path}: not an ONNX model that can be run: {error}") from error
    except _Reaches as error:
        raise WeightsError(f"weights {path}: refused: {error}") from error


def check_torchscript(data: bytes, path: Path) -> None:
    """Refuse a TorchScript archive whose code calls operators that reach files or are not PyTorch's own.

    Args:
        data: The whole file.
        path: For messages.

    Raises:
        WeightsError: Such code, or no TorchScript archive at all.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            code = _code(archive, path)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, OSError, ValueError) as error:
        raise WeightsError(f"weights {path}: not a TorchScript file: {error}") from error
    bare = _STRING_OR_COMMENT.sub(lambda found: "" if found[0].startswith("#") else "''", code)
    calls = {f"torch.{name}" for text in (code, bare) for name in _FILE_CALLS.findall(text)}
    calls |= {f"ops.{space}" for space in _OPERATOR_SPACES.findall(bare) if space not in _KNOWN_SPACES}
    calls |= {f"{name} by another name" for name in _BARE_MODULE.findall(bare)}
    if calls:
        raise WeightsError(f"weights {path}: refused: its code calls {', '.join(sorted(calls))}")


def check_file(path: Path, data: bytes) -> str:
    """Check whatever the file's name says it is; return what was checked, in words.

    Raises:
        WeightsError: See ``check_onnx`` and ``check_torchscript``.
    """
    if path.suffix == ".onnx":
        check_onnx(data, path)
        return "onnx: one file, known operators"
    if path.name.endswith((".torchscript.pt", ".torchscript")) or _has_code(data):
        check_torchscript(data, path)
        return "torchscript: a program; none of its calls reach files"
    if path.suffix == ".safetensors":
        return "safetensors: tensors only"
    if path.suffix in (".pt", ".pth"):
        return "state dict: read with weights_only"
    return "format unknown"


def _has_code(data: bytes) -> bool:
    if not data.startswith(b"PK"):
        return False
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return any("/code/" in name.lower() for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, OSError):
        return False


def _code(archive: zipfile.ZipFile, path: Path) -> str:
    members = archive.infolist()
    names = [member.filename.lower() for member in members]  # PyTorch's reader takes upper for lower case
    if len(set(names)) != len(names):  # and might see the other one
        raise WeightsError(f"weights {path}: refused: two entries of the archive have one name")
    if any(name.endswith("/model.json") for name in names):  # which may give code any name
        raise WeightsError(f"weights {path}: refused: a TorchScript file of before 2019; save it anew")
    sources = [member for member, name in zip(members, names, strict=True) if name.endswith(".py")]
    if not sources or not any(name.endswith("/constants.pkl") for name in names):
        raise WeightsError(f"weights {path}: not a TorchScript file")
    if sum(member.file_size for member in sources) > _MAX_CODE_BYTES:
        raise WeightsError(f"weights {path}: refused: more than {_MAX_CODE_BYTES} bytes of code")
    return "\n".join(archive.read(member).decode("utf-8", "replace") for member in sources)


class _Malformed(Exception):  # noqa: N818  # never leaves this module
    """Bytes that are no protocol buffer of the expected kind."""


class _Reaches(Exception):  # noqa: N818
    """A model that names something outside of its file."""


_Value = int | memoryview


def _check_model(model: memoryview) -> None:
    fields = list(_fields(model))
    functions = [_message(value) for number, value in fields if number == _MODEL_FUNCTIONS]
    own = {_text(value) for function in functions for number, value in _fields(function) if number == _FUNCTION_DOMAIN}
    graphs = [_message(value) for number, value in fields if number == _MODEL_GRAPH]
    if len(graphs) != 1:
        raise _Malformed(f"{len(graphs)} graphs")
    for function in functions:
        for number, value in _fields(function):
            if number == _FUNCTION_NODES:
                _check_node(_message(value), own, 0)
    _check_graph(graphs[0], own, 0)


def _check_domain(domain: str, own: set[str]) -> None:
    if domain not in _DOMAINS and domain not in own:
        raise _Reaches(f"operators of the domain {domain[:60]!r}")


def _check_graph(graph: memoryview, own: set[str], depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise _Malformed("graphs in graphs without end")
    for number, value in _fields(graph):
        if number == _GRAPH_NODES:
            _check_node(_message(value), own, depth)
        elif number == _GRAPH_TENSORS:
            _check_tensor(_message(value))
        elif number == _GRAPH_SPARSE:
            _check_sparse(_message(value))


def _check_node(node: memoryview, own: set[str], depth: int) -> None:
    for number, value in _fields(node):
        if number == _NODE_OP and _text(value) in _FILE_OPERATORS:
            raise _Reaches(f"the operator {_text(value)}, which names a file")
        if number == _NODE_DOMAIN:
            _check_domain(_text(value), own)
        if number == _NODE_ATTRIBUTES:
            for kind, part in _fields(_message(value)):
                if kind in _ATTRIBUTE_TENSORS:
                    _check_tensor(_message(part))
                elif kind in _ATTRIBUTE_GRAPHS:
                    _check_graph(_message(part), own, depth + 1)
                elif kind in _ATTRIBUTE_SPARSE:
                    _check_sparse(_message(part))


def _check_sparse(sparse: memoryview) -> None:
    for number, value in _fields(sparse):
        if number in _SPARSE_TENSORS:
            _check_tensor(_message(value))


def _check_tensor(tensor: memoryview) -> None:
    for number, value in _fields(tensor):
        if number == _TENSOR_EXTERNAL or (number == _TENSOR_LOCATION and value != 0):
            raise _Reaches("tensors in another file; save the model as one file")


def _message(value: _Value) -> memoryview:
    if isinstance(value, int):
        raise _Malformed("a number where a message belongs")
    return value


def _text(value: _Value) -> str:
    return bytes(_message(value)).decode("utf-8", "replace")


def _fields(data: memoryview) -> Iterator[tuple[int, _Value]]:
    """Yield field number and value of one message: an int of a varint, else the bytes.

    Tensors are passed over without being copied.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key >= 1 << 32:  # readers drop what is above
            raise _Malformed("a field number of more than 29 bits")
        wire = key & 7
        value: _Value
        if wire == 0:
            value, at = _varint(data, at)
        else:
            if wire == 2:
                size, at = _varint(data, at)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                raise _Malformed(f"wire type {wire}")
            if size > len(data) - at:
                raise _Malformed("a field longer than the file")
            value, at = data[at : at + size], at + size
        yield key >> 3, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128 and number < 1 << 64:
            return number, at
    raise _Malformed("a number without an end")
