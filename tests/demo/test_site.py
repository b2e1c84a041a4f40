import io
import random
import shutil
from collections import Counter

import pytest
from PIL import Image

from curation.config import RunConfig
from curation.demo.broken import broken_files
from curation.demo.edits import EDITS
from curation.demo.site import build_site
from curation.demo.sources import SOURCES, Region, cell_region, regions
from curation.demo.truth import MINIMUM, Truth, check
from curation.demo.truth import load as load_truth
from curation.errors import InputError
from curation.settings import load

pytest.importorskip("skimage", reason="the demo's photos come with scikit-image")
pytest.importorskip("sklearn", reason="the demo's photos come with scikit-learn")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, build_site(folder)


def _bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_truth_holds(site):
    folder, truth = site

    assert check(truth, folder) == []


def test_there_is_as_much_of_everything_as_promised(site):
    counts = Counter(item.kind for item in site[1].items)

    assert all(counts[kind] >= least for kind, least in MINIMUM.items())
    assert counts["photo"] >= 150


def test_every_edit_is_planted_equally_often(site):
    edits = Counter(item.edit for item in site[1].of("copy"))

    assert set(edits) == set(EDITS)
    assert len(set(edits.values())) == 1


def test_photos_of_different_groups_show_different_pixels(site):
    shown = {item.group: item.region for item in site[1].items if item.region is not None}
    names = sorted(shown)

    assert not [(a, b) for i, a in enumerate(names) for b in names[:i] if shown[a].overlaps(shown[b])]


def test_the_same_seed_gives_the_same_bytes(site, tmp_path):
    build_site(tmp_path / "again")

    assert _bytes(tmp_path / "again") == _bytes(site[0])


def test_another_seed_replaces_the_site_in_its_folder(site, tmp_path):
    truth = build_site(tmp_path, seed=1)

    assert check(truth, tmp_path) == []
    assert truth.to_json() != site[1].to_json()

    build_site(tmp_path, seed=0)

    assert _bytes(tmp_path) == _bytes(site[0])


def test_a_second_build_touches_nothing(site):
    folder, truth = site
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    assert build_site(folder) == truth
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_damaged_site_is_built_again(site, tmp_path):
    shutil.copytree(site[0], tmp_path / "copy")
    damaged = tmp_path / "copy" / site[1].of("photo")[0].path
    damaged.write_bytes(b"damage")

    build_site(tmp_path / "copy")

    assert damaged.read_bytes() != b"damage"


def test_files_of_somebody_else_are_never_cleared(tmp_path):
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds" / "mine.jpg").write_bytes(b"mine")

    with pytest.raises(InputError, match="not of the demo"):
        build_site(tmp_path)

    assert (tmp_path / "seeds" / "mine.jpg").read_bytes() == b"mine"


def test_of_a_group_the_original_is_the_largest(site):
    folder, truth = site

    def size(path):
        with Image.open(folder / path) as image:
            return image.width * image.height, (folder / path).stat().st_size

    assert all(size(item.path) < size(item.original) for item in truth.of("copy", "small"))


def test_every_link_is_on_a_page(site):
    folder, truth = site
    html = "\n".join((folder / page).read_text() for page in truth.pages)

    assert not [item.path for item in truth.items if item.on_site and item.path.removeprefix("www/") not in html]


def test_faces_lie_within_their_photos(site):
    folder, truth = site
    for item in truth.of("face"):
        with Image.open(folder / item.path) as image:
            width, height = image.size
        for left, top, right, bottom in item.faces:
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert right - left >= 40


def test_no_broken_file_decodes():
    rng = random.Random(0)
    photo = Image.effect_noise((256, 256), 60).convert("RGB")
    decoded = []
    for name, (_, data) in broken_files(photo, rng).items():
        if name == "huge.png":
            continue  # decodes for a long time instead; its header says 60,000 x 60,000
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
            decoded.append(name)
        except (OSError, SyntaxError):
            pass

    assert decoded == []


def test_the_truth_survives_json(site):
    folder, truth = site

    assert Truth.from_json(truth.to_json()) == truth == load_truth(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"maker": "", "pages": [], "items": [{}]}', "nonsense"])
def test_another_file_is_no_truth_table(text):
    with pytest.raises(InputError, match="truth table"):
        Truth.from_json(text)


def test_the_check_names_what_is_wrong(site, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(site[0], folder)
    truth = site[1]
    photo, copy = truth.of("photo")[0], truth.of("copy")[0]
    (folder / photo.path).write_bytes(b"other")
    (folder / copy.path).unlink()

    problems = check(truth, folder)

    assert f"{photo.path}: has other bytes than listed" in problems
    assert f"{copy.path}: no such file" in problems


def test_the_check_notices_too_few_copies(site):
    folder, truth = site
    few = Truth(truth.maker, truth.pages, tuple(item for item in truth.items if item.kind != "copy"))

    assert check(few, folder) == ["0 of kind copy, fewer than 60"]


@pytest.mark.parametrize(("shift", "overlaps"), [(63, True), (64, False), (-64, False), (-63, True)])
def test_regions_that_touch_do_not_overlap(shift, overlaps):
    region = Region("china", 100, 100, 164, 164)

    assert region.overlaps(Region("china", 100 + shift, 100, 164 + shift, 164)) is overlaps
    assert region.overlaps(Region("china", 100, 100 + shift, 164, 164 + shift)) is overlaps
    assert not region.overlaps(Region("flower", 100, 100, 164, 164))


def test_the_maps_fit_the_photos():
    for name, source in SOURCES.items():
        assert len({len(row) for row in source.marks}) == 1
        last = cell_region(name, len(source.marks[0]) - 1, len(source.marks) - 1)
        assert last.x1 <= source.size[0]
        assert last.y1 <= source.size[1]
        assert set("".join(source.marks)) <= set(".#oRPF")
    assert len(list(regions("R"))) >= 10


def test_the_settings_of_the_demo_are_valid(pytestconfig):
    config = load(RunConfig, pytestconfig.rootpath / "configs" / "demo.yaml")

    assert config.fetch.allow_private_addresses
    assert config.pool.inputs[0].kind == "pages"
