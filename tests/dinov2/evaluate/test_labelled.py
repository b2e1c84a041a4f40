import numpy as np
import pytest

from curation.dinov2.evaluate.config import LabelledConfig
from curation.dinov2.evaluate.labelled import drawn, open_labelled
from curation.errors import InputError

CLASSES = ("columns", "dots", "rows")


def opened(path, **changes):
    needs_labels = changes.pop("needs_labels", True)
    return open_labelled(LabelledConfig(path=str(path), **changes), 0, needs_labels=needs_labels)


def contents(part):
    return [(data, label) for data, label in part.read()]


def test_a_split_column_divides_a_file(labelled_parquet, rows):
    found = opened(labelled_parquet)

    assert found.classes == CLASSES
    for part, name in ((found.train, "train"), (found.test, "test")):
        wanted = [(row["image"]["bytes"], CLASSES.index(row["label"])) for row in rows if row["split"] == name]
        assert contents(part) == wanted


def test_two_files_need_no_split(tmp_path, rows, write_parquet):
    without = [{key: row[key] for key in ("image", "label")} for row in rows]
    first, second = (
        write_parquet(tmp_path / "a.parquet", without[:9]),
        write_parquet(tmp_path / "b.parquet", without[60:]),
    )

    found = opened(first, test_path=str(second))

    assert (len(found.train), len(found.test)) == (9, 30)
    assert contents(found.test)[4] == (rows[64]["image"]["bytes"], CLASSES.index(rows[64]["label"]))


def test_folders_of_classes_are_the_same_set(tmp_path, labelled_parquet, rows):
    for number, row in enumerate(rows):
        folder = tmp_path / row["split"] / row["label"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03d}.png").write_bytes(row["image"]["bytes"])

    found, parquet = opened(tmp_path), opened(labelled_parquet)

    assert found.classes == parquet.classes
    assert sorted(contents(found.train)) == sorted(contents(parquet.train))
    assert sorted(contents(found.test)) == sorted(contents(parquet.test))


def test_whole_numbers_are_classes_in_their_order(tmp_path, rows, write_parquet):
    numbered = [{**row, "label": number % 12} for number, row in enumerate(rows)]

    found = opened(write_parquet(tmp_path / "n.parquet", numbered))

    assert found.classes == tuple(str(number) for number in range(12))
    assert found.train.label_N.tolist() == [number % 12 for number in range(60)]


def test_a_number_is_the_same_class_in_files_of_shorter_and_longer_ones(tmp_path, rows, write_parquet):
    numbered = [{"image": row["image"], "label": number % 12} for number, row in enumerate(rows)]

    found = opened(
        write_parquet(tmp_path / "a.parquet", numbered[:12]),
        test_path=str(write_parquet(tmp_path / "b.parquet", numbered[12:15])),
    )

    assert found.test.label_N.tolist() == found.train.label_N.tolist()[:3] == [0, 1, 2]


def test_a_drawn_part_is_a_part_and_follows_from_the_seed(labelled_parquet):
    whole, few, again = (opened(labelled_parquet, max_train=limit) for limit in (None, 20, 20))

    assert few.train.rows.tolist() == again.train.rows.tolist()
    assert contents(few.train) == [contents(whole.train)[row] for row in few.train.rows]
    assert few.train.rows.tolist() != list(range(20))


def test_rows_without_a_label_are_left_out_and_counted(tmp_path, rows, write_parquet):
    some = [{**row, "label": None if number in (3, 70) else row["label"]} for number, row in enumerate(rows)]

    found = opened(write_parquet(tmp_path / "some.parquet", some))

    assert (len(found.train), len(found.test), found.num_unlabelled) == (59, 29, 2)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda row: {**row, "label": None}, {}, "no labelled images to learn from"),
        (lambda row: {**row, "label": "rows"}, {}, r"of one class \(rows\)"),
        (lambda row: {"image": row["image"], "split": row["split"]}, {}, "no labels: there is no column label"),
        (lambda row: {"image": row["image"], "label": "a"}, {}, "no column split says what to test on; give --test"),
        (lambda row: {"label": "a", "split": "train"}, {}, "set data.image_column to one of label, split"),
        (lambda row: {**row, "image": "a.png"}, {}, "column image is string; it must hold bytes"),
        (lambda row: row, {"test_split": "val"}, r"no row has split 'val'; it has test \(30\), train \(60\)"),
    ],
)  # fmt: skip
def test_a_set_that_cannot_be_used_is_refused_with_what_to_do(tmp_path, rows, change, settings, message, write_parquet):
    path = write_parquet(tmp_path / "set.parquet", [change(row) for row in rows])

    with pytest.raises(InputError, match=message):
        opened(path, **settings)


def test_files_that_are_not_what_they_say_are_refused(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "train" / "a").mkdir(parents=True)

    with pytest.raises(InputError, match=r"broken\.parquet: cannot be read as Parquet"):
        opened(tmp_path / "broken.parquet")
    with pytest.raises(InputError, match="nowhere/train: is not there"):
        opened(tmp_path / "nowhere")


def test_images_without_labels_are_enough_for_what_needs_none(tmp_path, rows, write_parquet):
    (tmp_path / "flat").mkdir()
    for number, row in enumerate(rows[:5]):
        (tmp_path / "flat" / f"{number}.png").write_bytes(row["image"]["bytes"])
    bare = write_parquet(tmp_path / "bare.parquet", [{"image": row["image"]} for row in rows[:5]])

    for path in (tmp_path / "flat", bare):
        found = opened(path, needs_labels=False)
        assert [data for data, _ in contents(found.test)] == [row["image"]["bytes"] for row in rows[:5]]
        assert np.all(found.test.label_N == -1)


def test_images_for_pictures_are_drawn_from_all_of_a_part(labelled_parquet):
    part = opened(labelled_parquet).test
    few = drawn(part, 6, [3])

    assert len(few) == 6
    assert set(few.rows) < set(part.rows)
    assert few.rows.tolist() == sorted(few.rows.tolist()) != part.rows[:6].tolist()
