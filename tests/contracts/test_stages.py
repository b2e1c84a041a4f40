"""What must hold for every step of the real plan, whatever it does."""

import importlib
import os
import re
from pathlib import Path

import pytest

from curation import schema
from curation.cli.runs import STAGES
from curation.config import RunConfig
from curation.crawl.links import LINK_REASONS, PAGE_REASONS
from curation.fingerprint import fingerprint
from curation.pipelines.lvd142m import build_plan
from curation.report.words import reason_text
from curation.schema import Table
from curation.settings import Settings, parse

PACKAGE = Path(importlib.import_module("curation").__file__).parent
SET = {"inputs": [{"kind": "folder", "path": "images"}]}
TREE = {"pool": SET, "seeds": {"some": SET}, "references": {"test": SET}, "cluster": {"levels": [10]}}
CONFIG = parse(RunConfig, TREE, "test.yaml")
PLAN = build_plan(CONFIG)
COLLECTIONS = {"pool": "pool", "seeds": "seeds/some", "references": "references/test"}
TABLES = {table.name: table for table in vars(schema).values() if isinstance(table, Table)}
every_step = pytest.mark.parametrize("step", PLAN.steps, ids=lambda step: step.name)


def stage_class(step):
    """The class in ``curation.stages`` that does a step, if it has one."""
    for path in sorted((PACKAGE / "stages").glob("*.py")):
        for found in vars(importlib.import_module(f"curation.stages.{path.stem}")).values():
            if isinstance(found, type) and getattr(found, "name", None) == step.name and hasattr(found, "version"):
                return found
    return None


def all_settings(config, step):
    names = [COLLECTIONS[kind] for kind in step.collections]
    return {name: step.settings(config, name) for name in (["", *names] if step.kind == "reduce" else names)}


@every_step
def test_a_step_has_a_version(step):
    assert isinstance(step.version, int)
    assert step.version >= 1


@every_step
def test_a_stage_is_a_section_of_the_settings(step):
    assert step.stage in RunConfig.model_fields


@every_step
def test_tables_are_those_of_the_schema(step):
    for table in (*step.reads, *step.after, *([step.writes] if step.writes else [])):
        assert TABLES[table.name].schema.names == table.schema.names


@every_step
def test_what_is_waited_for_are_verdicts(step):
    assert all(table.is_verdict for table in step.after)


@every_step
def test_no_row_is_worked_on_that_an_earlier_verdict_on_all_of_its_collections_rejects(step):
    if step.name in ("nsfw", "faces"):  # they do not wait for pca_hash
        return
    before = [other for other in PLAN.steps[: PLAN.steps.index(step)] if other.stage != step.stage and other.writes]
    earlier = [other.writes.name for other in before if other.writes.is_verdict]
    if step.kind in ("images", "reduce") and step.stage != "pca_hash":
        assert [table.name for table in step.after] == earlier


@every_step
def test_a_step_does_what_its_stage_promises(step):
    stage = stage_class(step)
    if step.kind in ("crawl", "fetch"):
        assert stage is None
        return
    assert stage is not None, f"no class of curation.stages is named {step.name}"
    assert stage.version == step.version, "the plan and the stage disagree about the version"
    if isinstance(getattr(stage, "writes", None), Table):
        assert step.writes is not None
        assert stage.writes.schema.names == step.writes.schema.names
    if "reads" in vars(stage):
        assert tuple(stage.reads) == step.reads
    if "artefacts" in vars(stage):
        assert tuple(stage.artefacts) == step.makes


@every_step
def test_settings_are_plain_values_with_a_stable_identity(step):
    first = {name: fingerprint(settings) for name, settings in all_settings(CONFIG, step).items()}
    again = {name: fingerprint(settings) for name, settings in all_settings(parse(RunConfig, TREE, "x"), step).items()}

    assert first == again


@every_step
def test_weights_are_names_of_settings(step):
    assert all(isinstance(name, str) and name for name in step.weights(CONFIG))


def test_the_help_lists_the_stages_of_the_plan():
    assert tuple(STAGES.split()) == PLAN.stages


# -- every setting shapes an output, or is known not to -------------------------------------------------------------

OTHER = {  # values that are other than the default, and allowed
    "fetch.consent": {"tdm": False},
    "fetch.policy": {"tracking_pixels": False},
    "fetch.proxy": "http://proxy.example:3128",
    "fetch.blocked_hashes": [os.devnull],
    "fetch.blocked_pdq": [os.devnull],
    "fetch.host_requests_per_s": 1.0,
    "fetch.resize": {"side_px": 64},
    "embed.preset": "dinov2-vits14",
    "embed.features": "pooled",
    "embed.precision": "bf16",
    "embed.side_px": 64,
    "sscd.side_px": 64,
    "sscd.precision": "bf16",
    "sscd.whitening": "fit",
    "sscd.score_norm": "fit",
    "index.kind": "flat",
    "index.num_lists": 64,
    "index.code_bytes": 64,
    "index.probes": 64,
    "index.depth": 64,
    "cluster.levels": [11],
    "cluster.linkage": "kmeans",
    "cluster.resampled_per_cluster": 5,
    "retrieve.balanced_images": 10,
    "faces.scales": [3.0],
    "retrieve.collisions": "next_neighbour",
    "images.max_aspect": 2.0,
    "pca_hash.method": "dhash",
    "pca_hash.features": "model",
    "pca_hash.pca": "default",
    "dedup.decontaminate": "neighbours",
    "dedup.min_similarity_to_representative": 0.5,
    "dedup.backend": "exact",
}
SHAPES_NOTHING = {
    "crawl.max_download_bytes": "refused altogether beyond it",
    "crawl.input_attempts": "how patiently",
    "crawl.input_backoff_s": "how patiently",
    "crawl.input_timeout_s": "how patiently",
    "fetch.host_requests_per_s": "how politely",
    "fetch.max_crawl_delay_s": "how politely",
    "fetch.host_failures": "how patiently",
    "fetch.idle_timeout_s": "how patiently",
    "fetch.concurrency": "how fast",
    "fetch.host_concurrency": "how fast",
    "fetch.timeout_s": "how patiently",
    "fetch.connect_timeout_s": "how patiently",
    "fetch.retries": "how patiently",
    "fetch.proxy": "by which way",
    "fetch.blocked_pdq": "what of what comes is discarded; rows that are there stay",
    "fetch.blocked_pdq_distance": "as blocked_pdq",
    "images.decode_threads": "how fast",
    "images.decode_timeout_s": "how patiently",
    "images.prepare_timeout_s": "how patiently",
    "nsfw.batch_size": "scores do not depend on it",
}


def leaves():
    for section, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            for name, inner in field.annotation.model_fields.items():
                if section not in ("pool", "manifest") and name != "weights":
                    yield f"{section}.{name}", inner.default


@pytest.mark.parametrize(("key", "default"), list(leaves()))
def test_a_setting_shapes_an_output_or_is_known_not_to(key, default):
    section, name = key.split(".")
    if key in OTHER:
        value = OTHER[key]
    elif isinstance(default, bool):
        value = not default
    elif isinstance(default, str):
        value = "another"
    else:
        value = default + 1 if isinstance(default, int) else default * 0.99
    changed = parse(RunConfig, {**TREE, section: {**TREE.get(section, {}), name: value}}, "test.yaml")

    differ = [step.name for step in PLAN.steps if all_settings(changed, step) != all_settings(CONFIG, step)]

    assert bool(differ) != (key in SHAPES_NOTHING), f"{key} changes {differ}"


@pytest.mark.parametrize("section", ["nsfw", "faces", "sscd", "embed"])
def test_other_weights_shape_an_output(section):
    changed = parse(RunConfig, {**TREE, section: {"weights": "another"}}, "test.yaml")

    differ = [step.name for step in PLAN.steps if step.weights(changed) != step.weights(CONFIG)]

    assert section in differ


# -- every reason is documented -------------------------------------------------------------------------------------


def documented():
    return set(schema.REASONS) | schema.IMAGE_REASONS | LINK_REASONS


def raised(pattern, *folders):
    found = set()
    for folder in folders:
        for path in sorted((PACKAGE / folder).glob("*.py") if (PACKAGE / folder).is_dir() else [PACKAGE / folder]):
            found |= {(path.name, reason) for reason in re.findall(pattern, path.read_text(encoding="utf-8"))}
    return found


def test_every_reason_in_the_code_is_documented():
    images = raised(r'ImageError\(\s*"([a-z_0-9]+)"', "images.py", "containers.py", "stages", "crawl", "pipelines")
    links = raised(r'LinkError\(\s*"([a-z_0-9]+)"', "crawl")
    assert images
    assert links

    assert {reason for _, reason in images} <= schema.IMAGE_REASONS
    assert {reason for _, reason in links} <= LINK_REASONS | PAGE_REASONS
    assert not {
        (name, reason)
        for name, reason in raised(
            r'"((?:exact|hash|near|reference|seed)_(?:duplicate|copy)|nsfw|discarded|not_retrieved|excluded_[a-z]+)"',
            "stages",
        )
        if reason not in documented()
    }


def test_every_reason_is_explained_to_people():
    assert [reason for reason in documented() if not reason_text(reason)] == []


def test_every_documented_reason_of_the_pipeline_is_used():
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((PACKAGE / "stages").glob("*.py")))

    missing = {
        reason
        for reason in schema.REASONS
        if f'"{reason}"' not in text and not (reason.startswith("excluded_") and "excluded_" in text)
    }

    assert not missing
