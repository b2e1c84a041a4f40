import io

import numpy as np
import pytest
from PIL import Image

from curation.config.images import ImagesConfig
from curation.edits import EDITS
from curation.images import decode

CASES = [(edit, strength) for edit in EDITS for strength in edit.strengths]
ids = [f"{edit.name}-{strength:g}" for edit, strength in CASES]


def photo(seed=0, size=(97, 61)):
    """Smooth shapes with some grain, so that every edit shows."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return Image.fromarray(np.clip(np.asarray(coarse) + rng.integers(0, 9, (*size[::-1], 3)), 0, 255).astype(np.uint8))


def make(edit, strength, seed=3, image=None):
    others = [photo(10 + number) for number in range(edit.num_others(strength))]
    return edit(photo() if image is None else image, strength, np.random.default_rng(seed), others)


def test_there_are_at_least_twelve_edits_with_names_of_their_own():
    assert len({edit.name for edit in EDITS}) == len(EDITS) >= 12


@pytest.mark.parametrize(("edit", "strength"), CASES, ids=ids)
def test_an_edit_changes_the_image_the_same_way_every_time(edit, strength):
    before = photo()
    untouched = before.tobytes()
    data = make(edit, strength, image=before)

    assert data == make(edit, strength)
    assert before.tobytes() == untouched, "the image itself was changed"
    pixels = decode(data, ImagesConfig(min_side_px=1))
    same_shape = pixels.shape == np.asarray(before).shape
    assert not same_shape or np.abs(pixels.astype(int) - np.asarray(before)).mean() > 0.5


@pytest.mark.parametrize(("edit", "strength"), CASES, ids=ids)
@pytest.mark.parametrize("size", [(16, 16), (16, 320), (640, 33)])
def test_an_edit_takes_any_image_that_the_pipeline_takes(edit, strength, size):
    decode(make(edit, strength, image=photo(size=size)), ImagesConfig(min_side_px=1, max_aspect=1e3))


@pytest.mark.parametrize("edit", [edit for edit in EDITS if len(edit.strengths) > 1], ids=lambda edit: edit.name)
def test_strengths_differ(edit):
    assert len({make(edit, strength) for strength in edit.strengths}) == len(edit.strengths)


def test_drawn_choices_follow_the_generator():
    crop = next(edit for edit in EDITS if edit.name == "crop")

    assert make(crop, 0.5, seed=1) != make(crop, 0.5, seed=2)


def test_other_images_are_seen_in_a_collage():
    collage = next(edit for edit in EDITS if edit.name == "collage")
    white, black = (Image.new("RGB", (40, 40), colour) for colour in ("white", "black"))

    page = Image.open(io.BytesIO(collage(white, 4, np.random.default_rng(0), [black] * 3)))

    assert page.size == (80, 80)
    assert np.asarray(page).mean() == pytest.approx(255 / 4, abs=3)
