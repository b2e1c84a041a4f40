"""One way to open an ONNX model: fixed thread counts, repeatable results, clear errors."""

import onnxruntime as ort

from curation.errors import WeightsError
from curation.models.formats import check_onnx
from curation.models.weights import Weights

_STATE = ort.capi.onnxruntime_pybind11_state
FAILURES: tuple[type[Exception], ...] = (
    _STATE.InvalidProtobuf,
    _STATE.InvalidGraph,
    _STATE.InvalidArgument,
    _STATE.NotImplemented,
    _STATE.Fail,
)  # of a broken model or of input that a model does not take


def open_session(weights: Weights, num_threads: int = 1, device: str = "cpu") -> ort.InferenceSession:
    """Open a session.

    Args:
        weights: An ONNX file.
        num_threads: Threads inside an operator. Two sessions of one thread beat one session of two on a CPU.
        device: ``cpu`` or ``cuda``.

    Raises:
        WeightsError: The file is no ONNX model, reaches out of its own file, or the device is not offered by the
            installed ONNX Runtime.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    # Worker threads that spin between calls take cores from decoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device)
    if provider is None or provider not in ort.get_available_providers():
        raise WeightsError(
            f"weights {weights.name}: device {device} is not offered by the installed onnxruntime, which has "
            f"{', '.join(ort.get_available_providers())}; for cuda install onnxruntime-gpu in its place, or use cpu"
        )
    data = weights.read()
    check_onnx(data, weights.path)
    try:
        session = ort.InferenceSession(data, options, providers=[provider])
    except FAILURES as error:
        raise WeightsError(f"weights {weights.path}: not an ONNX model that can be run: {error}") from error
    # Where CUDA or cuDNN cannot be loaded, ONNX Runtime only logs it and goes on, many times slower, on the CPU.
    if provider not in session.get_providers():
        raise WeightsError(
            f"weights {weights.name}: onnxruntime offers {provider} but could not start it; check the driver, CUDA and "
            "cuDNN, or use cpu"
        )
    return session
