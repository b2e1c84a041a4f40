"""A plan is checked when it is built: everything read is written before, once."""

import pyarrow as pa
import pytest

from curation.config import RunConfig
from curation.errors import ConfigError, InputError, PlanError, UsageError
from curation.pipelines.lvd142m import build_plan
from curation.pipelines.plan import Plan, Step
from curation.schema import REJECT_REASON, Table
from curation.settings import parse

LINKS = Table("links", pa.schema([("url", pa.string())]))
SCORES = Table("scores", pa.schema([("score", pa.float32())]))
VERDICT = Table("verdict", pa.schema([REJECT_REASON]))


def step(name, collections=("pool",), **fields):
    return Step(name, fields.pop("stage", name), "map", 1, collections, lambda context: None, **fields)


def test_a_table_that_is_read_before_it_is_written_is_refused():
    writer = step("score", reads=(), writes=SCORES)
    reader = step("judge", reads=(SCORES,), writes=VERDICT)

    Plan((writer, reader))
    with pytest.raises(PlanError, match="step judge reads table scores, but no step before it writes"):
        Plan((reader, writer))


def test_a_verdict_that_is_waited_for_before_it_is_made_is_refused():
    with pytest.raises(PlanError, match="step score reads table verdict"):
        Plan((step("score", after=(VERDICT,), writes=SCORES), step("judge", writes=VERDICT)))


def test_a_table_that_only_other_collections_have_is_not_there():
    writer = step("score", ("references",), writes=SCORES)

    with pytest.raises(PlanError, match="step judge reads table scores"):
        Plan((writer, step("judge", ("pool",), reads=(SCORES,), writes=VERDICT)))


def test_an_artefact_that_nobody_makes_is_refused_naming_both():
    with pytest.raises(PlanError, match="step hash needs what fit makes, but fit does not come before it"):
        Plan((step("hash", needs=("fit",), writes=SCORES), step("fit", makes=("pca.npz",))))


def test_two_writers_of_a_table_are_refused_naming_both():
    with pytest.raises(PlanError, match="step second writes table scores, which step first writes too"):
        Plan((step("first", writes=SCORES), step("second", writes=SCORES)))


def test_two_steps_of_one_name_are_refused():
    with pytest.raises(PlanError, match="2 steps are named fit"):
        Plan((step("fit", makes=("a",)), step("fit", makes=("b",))))


def test_an_unknown_stage_lists_the_stages():
    plan = build_plan(RunConfig())

    with pytest.raises(UsageError, match="there is no stage 'nosuch'; stages, in order: crawl, fetch, pca_hash, nsfw"):
        plan.through("nosuch")


def test_through_a_stage_means_all_of_its_steps_and_none_behind_it():
    plan = Plan(
        (
            step("links", writes=LINKS),
            step("fit", stage="hash", makes=("a",)),
            step("hash", writes=SCORES),
            step("last"),
        )
    )

    assert [found.name for found in plan.through("hash")] == ["links", "fit", "hash"]
    assert plan.stages == ("links", "hash", "last")


def test_verdicts_are_those_of_the_collection_in_order():
    plan = build_plan(RunConfig())

    assert [found.stage for found in plan.verdicts("references")] == ["fetch"]
    assert [found.stage for found in plan.verdicts("seeds")] == [
        "fetch",
        "pca_hash",
        "nsfw",
        "faces",
        "dedup",
        "manifest",
    ]
    assert [found.stage for found in plan.verdicts("pool")] == [
        "fetch", "pca_hash", "nsfw", "faces", "dedup", "retrieve", "manifest",
    ]  # fmt: skip


def test_resources_of_unknown_stages_are_all_refused():
    config = RunConfig.model_validate_json('{"resources": {"nosuch": {}, "other": {}, "sscd": {}, "default": {}}}')

    with pytest.raises(ConfigError) as caught:
        build_plan(config)

    assert [problem.split(":")[0] for problem in caught.value.problems] == ["resources.nosuch", "resources.other"]


@pytest.mark.parametrize(
    ("embed", "weights"),
    [
        ({}, "efficientnet-lite0"),
        ({"preset": "dinov2-vits14"}, "timm:vit_small_patch14_reg4_dinov2.lvd142m"),
        ({"model": "hf-hub:lab/tiny", "weights": "hub"}, "hf-hub:lab/tiny"),
    ],
)
def test_the_encoders_weights_have_a_name_wherever_they_come_from(embed, weights) -> None:
    config = parse(RunConfig, {"embed": embed}, "test")
    plan = build_plan(config)

    assert [plan.step(name).weights(config) for name in ("embed", "cluster_fit")] == [(weights,)] * 2


@pytest.mark.parametrize(
    "change",
    [{"side_px": 192}, {"features": "pooled"}, {"precision": "bf16"}, {"channels_last": False}, {"compile": True}],
)
def test_what_changes_features_is_part_of_their_fingerprint(change) -> None:
    config, changed = (parse(RunConfig, {"embed": embed}, "test") for embed in ({}, change))
    step = build_plan(config).step("embed")

    assert step.settings(config, "pool") != step.settings(changed, "pool")


@pytest.mark.parametrize(
    "change",
    [
        *({"consent": {name: False}} for name in ("robots", "page", "headers", "tdm")),
        *({"policy": {"ports": [80]}}, {"policy": {"tracking_pixels": False}}, {"policy": {"blocked_urls": ["*/x/*"]}}),
    ],
)
def test_consent_and_policy_are_part_of_the_fingerprint_of_fetch(change) -> None:
    config, changed = (parse(RunConfig, {"fetch": fetch}, "test") for fetch in ({}, change))
    step = build_plan(config).step("fetch")

    assert step.settings(config, "pool") != step.settings(changed, "pool")


def test_the_content_of_domain_lists_is_part_of_the_fingerprint_of_fetch(tmp_path) -> None:
    def settings(name, text):
        (tmp_path / name).write_text(text)
        config = parse(RunConfig, {"fetch": {"policy": {"blocked_domains": [str(tmp_path / name)]}}}, "test")
        return build_plan(config).step("fetch").settings(config, "pool")

    assert settings("a", "bad.example\n") == settings("b", "bad.example\n") != settings("c", "worse.example\n")


def test_a_list_that_cannot_be_read_is_refused_before_a_run_starts(tmp_path) -> None:
    config = parse(RunConfig, {"fetch": {"policy": {"blocked_domains": [str(tmp_path / "no.txt")]}}}, "test")

    with pytest.raises(InputError, match=r"no\.txt cannot be read"):
        build_plan(config).step("fetch").check(config)
