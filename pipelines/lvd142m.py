"""The plan of LVD-142M: every stage, and the manifest, which tells how all of them were made."""

import hashlib
import json
from typing import Any

from curation import __version__, schema
from curation.config import RunConfig
from curation.errors import ConfigError, InputError
from curation.pipelines.context import Context
from curation.pipelines.dedup_steps import UNIQUE, deduplicate
from curation.pipelines.fetch_steps import bring_in
from curation.pipelines.freshness import assess, collections
from curation.pipelines.image_steps import hash_images, screen
from curation.pipelines.plan import Plan, Step
from curation.pipelines.selection_steps import select
from curation.pipelines.step_settings import plain
from curation.stages.manifest import ManifestStage

_OURS = ("pool", "seeds")


def build_plan(config: RunConfig) -> Plan:
    """Return the plan of a run.

    Raises:
        PlanError: If a step reads what no earlier step writes.
    """
    plan = Plan((*bring_in(), *hash_images(), *screen(), *deduplicate(), *select(), _list_images()))
    _check_resources(config, plan)
    return plan


def _list_images() -> Step:
    """Return the step of ``manifest``."""
    return Step(
        "manifest_verdict",
        "manifest",
        "reduce",
        ManifestStage.version,
        _OURS,
        _manifest,
        reads=ManifestStage.reads,
        after=(*UNIQUE, schema.RETRIEVE),
        writes=schema.MANIFEST_VERDICT,
        makes=ManifestStage.artefacts,
        locations=True,
        settings=lambda config, _: {
            "exclude": {name: _list_digests(paths) for name, paths in config.manifest.exclude},
            "as_is": sorted(name for name, seeds in config.seeds.items() if seeds.as_is),
            **_blocked(config),
        },
    )


def _manifest(context: Context) -> ManifestStage:
    plan = build_plan(context.config)
    verdicts = {
        kind: [
            (step.stage, step.writes)
            for step in plan.verdicts(kind)
            if step.writes is not None and step.name != ManifestStage.name
        ]
        for kind in _OURS
    }
    names = dict.fromkeys(name for step in plan.steps for name in step.weights(context.config))
    weights = {
        name: {"sha256": found.sha256, "license": found.license}
        for name, found in ((name, context.weights(name)) for name in names)
    }
    provenance = {
        "version": __version__,
        "weights": weights,
        "accept_licenses": list(context.config.accept_licenses),
        "consent": {**_consent(context, plan), "user_agent": context.config.fetch.user_agent},
        "config": context.config.model_dump(mode="json"),
        "made_with_other_settings": _kept_stale(context, plan),
    }
    return ManifestStage(context.config, verdicts, provenance)


def _consent(context: Context, plan: Plan) -> dict[str, bool]:
    """Return which checks of ``fetch.consent`` are on, and were whenever an image was fetched."""
    found = [plain(context.config.fetch.consent)]
    for collection in collections(context, plan.step("fetch")):
        markers = context.run.markers(collection, "fetch").values()
        texts = {marker.inputs["setting consent"] for marker in markers if "setting consent" in marker.inputs}
        found += [json.loads(text) for text in sorted(texts)]
    return {name: all(checks.get(name, True) for checks in found) for name in found[0]}


def _kept_stale(context: Context, plan: Plan) -> dict[str, list[str]]:
    """Return the steps that were kept although they were made with other settings, and what differs."""
    stale: dict[str, list[str]] = {}
    for step in plan.steps:
        if step.name != ManifestStage.name and (step.protected or step.reads_raw):
            changed = {
                name for found in assess(context, plan, step) if found.state == "stale" for name in found.changed
            }
            if changed:
                stale[step.name] = sorted(changed)
    return stale


def _blocked(config: RunConfig) -> dict[str, Any]:
    """Return what lists of images say: those that came to be listed once they were fetched are in no manifest."""
    paths = config.fetch.blocked_hashes
    return {"blocked_hashes": _list_digests(paths, "fetch.blocked_hashes")} if paths else {}


def _list_digests(paths: Any, setting: str = "manifest.exclude") -> list[str]:
    """Return the digests of exclusion lists: what they say shapes the manifest, not where they lie."""
    digests = []
    for path in paths:
        try:
            with open(path, "rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
        except OSError as error:
            raise InputError(f"{setting}: {path} cannot be read: {error.strerror}") from error
    return digests


def _check_resources(config: RunConfig, plan: Plan) -> None:
    unknown = sorted(set(config.resources) - set(plan.stages) - {"default"})
    if unknown:
        raise ConfigError(
            [f"resources.{name}: is no stage; stages: default, {', '.join(plan.stages)}" for name in unknown]
        )
