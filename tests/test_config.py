"""Settings: every mistake at once, strict types, overrides, and a round trip."""

from pathlib import Path

import pytest
from pydantic import ValidationError

import curation
from curation import settings as yaml_settings
from curation.config import RunConfig, absolute
from curation.config.fetch import FetchConfig, PolicyConfig
from curation.config.inputs import InputConfig, SeedConfig
from curation.dinov2.config import TrainConfig
from curation.errors import ConfigError, UsageError
from curation.settings import Settings

CONFIGS = Path(curation.__file__).parent / "configs"


def load(tmp_path, text, *overrides):
    path = tmp_path / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return yaml_settings.load(RunConfig, path, overrides)


def problems(tmp_path, text, *overrides):
    """Return the mistakes that are reported, with the folder cut off."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems]


def test_all_mistakes_are_reported_at_once_with_file_key_and_reason(tmp_path):
    text = "nsfw:\n  max_score: 50\nfetch:\n  timeout_s: fast\ndedupe: {}\n"

    assert sorted(problems(tmp_path, text)) == [
        "my.yaml: dedupe: unknown key; did you mean dedup?",
        "my.yaml: fetch.timeout_s: must be a number, got 'fast'",
        "my.yaml: nsfw.max_score: must be at most 1, got 50",
    ]


def test_mistakes_in_the_file_and_on_the_command_line_are_reported_together(tmp_path):
    found = problems(tmp_path, "nsfw: {max_score: 50}", "fetch.timeout_s", "dedup.threshold=2")

    assert len(found) == 3
    assert "--set fetch.timeout_s: must look like section.key=value" in found
    assert "--set dedup.threshold=2: dedup.threshold: must be at most 0.99, got 2" in found
    assert "my.yaml: nsfw.max_score: must be at most 1, got 50" in found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("fetch: {timeout: 3}", "my.yaml: fetch.timeout: unknown key"),
        ("fetch: {timeout_s: '3'}", "my.yaml: fetch.timeout_s: must be a number, got '3'"),
        ("fetch: {concurrency: 1.5}", "my.yaml: fetch.concurrency: must be a whole number, got 1.5"),
        ("fetch: {concurrency: true}", "my.yaml: fetch.concurrency: must be a whole number, got true"),
        ("fetch: {consent: {robots: 1}}", "my.yaml: fetch.consent.robots: must be true or false, got 1"),
        ("fetch: {user_agent: 7}", "my.yaml: fetch.user_agent: must be text, got 7"),
        ("fetch: {timeout_s: 0}", "my.yaml: fetch.timeout_s: must be more than 0, got 0"),
        ("fetch: {timeout_s: .inf}", "my.yaml: fetch.timeout_s: must be"),
        ("fetch: {timeout_s: .nan}", "my.yaml: fetch.timeout_s: must be"),
        ("shards: {rows: 0}", "my.yaml: shards.rows: must be at least 1, got 0"),
        ("dedup: {threshold: 1}", "my.yaml: dedup.threshold: must be at most 0.99, got 1"),
        ("retrieve: {collisions: maybe}", "my.yaml: retrieve.collisions: must be 'keep_nominal' or 'next_neighbour'"),
        ("faces: {scales: []}", "my.yaml: faces.scales: must have at least 1 entries, got 0"),
        ("faces: {scales: 2}", "my.yaml: faces.scales: must be a list, got 2"),
        ("fetch: 3", "my.yaml: fetch: must be a mapping, got 3"),
        ("seeds: [a]", "my.yaml: seeds: must be a mapping"),
        ("seeds: {Upper: {inputs: []}}", "my.yaml: seeds.Upper: must match"),
        ("seeds: {a: {}}", "my.yaml: seeds.a.inputs: is required"),
        ("pool: {inputs: [{kind: zip, path: x}]}", "my.yaml: pool.inputs.0.kind: must be"),
        (
            "pool: {inputs: [{kind: parquet, path: 's3://b/x.parquet'}]}",
            "my.yaml: pool.inputs.0: path s3://b/x.parquet: inputs of kind parquet lie on this machine",
        ),
        ("pool: {inputs: [{kind: folder}]}", "my.yaml: pool.inputs.0: give either path or urls"),
        ("pool: {inputs: [{kind: folder, urls: [u]}]}", "my.yaml: pool.inputs.0: urls cannot be given for kind folder"),
        ("1: 2", "my.yaml: 1: unknown key"),
    ],
)
def test_a_mistake_is_named_with_its_key_and_what_was_found(tmp_path, text, problem):
    assert any(found.startswith(problem) for found in problems(tmp_path, text)), problems(tmp_path, text)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"fetch: [", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"- a\n- b\n", "must be a mapping of sections"),
        (b"!!python/object/apply:os.getpid []\n", "is not valid YAML"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_is_no_mapping_is_one_clear_problem(tmp_path, content, reason):
    path = tmp_path / "my.yaml"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ConfigError) as caught:
        yaml_settings.load(RunConfig, path)

    assert len(caught.value.problems) == 1
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_config_is_wrong_use():
    assert issubclass(ConfigError, UsageError)


def test_an_empty_file_is_all_defaults(tmp_path):
    assert load(tmp_path, "") == RunConfig()


def test_an_override_wins_over_the_file_and_is_read_as_yaml(tmp_path):
    text = "fetch: {timeout_s: 3}\nseeds: {birds: {inputs: [{kind: folder, path: a}]}}"

    loaded = load(
        tmp_path,
        text,
        "fetch.timeout_s=10",
        "fetch.consent.robots=false",
        "faces.scales=[1, 3.5]",
        "embed.side_px=null",
        "seeds.birds.k=7",
        "seeds.birds.inputs.0.path=b",
        "resources.embed.gpus=1",
    )

    assert loaded.fetch.timeout_s == 10
    assert loaded.fetch.consent.robots is False
    assert loaded.faces.scales == (1.0, 3.5)
    assert loaded.embed.side_px is None
    assert loaded.seeds["birds"].k == 7
    assert loaded.seeds["birds"].inputs[0].path == "b"
    assert loaded.resources["embed"].gpus == 1


def test_an_override_may_contain_an_equals_sign(tmp_path):
    assert load(tmp_path, "", "fetch.user_agent=bot/1 (a=b)").fetch.user_agent == "bot/1 (a=b)"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("fetch", "must look like section.key=value"),
        ("=3", "must look like section.key=value"),
        ("fetch..timeout_s=3", "must look like section.key=value"),
        ("fetch.timeout_s=[", "is not valid YAML"),
        ("fetch.timeout_s.deep=3", "fetch.timeout_s has no key deep"),
        ("pool.inputs.4.path=x", "pool.inputs has no key 4"),
    ],
)
def test_an_override_that_makes_no_sense_is_refused(tmp_path, override, reason):
    text = "fetch: {timeout_s: 3}\npool: {inputs: [{kind: folder, path: a}]}"

    assert any(override in found and reason in found for found in problems(tmp_path, text, override))


def test_an_unknown_key_in_an_override_names_the_override(tmp_path):
    assert problems(tmp_path, "", "nsfw.max=1") == ["--set nsfw.max=1: nsfw.max: unknown key"]


def test_what_is_dumped_loads_as_the_same_settings(tmp_path):
    settings = RunConfig(
        seed=2**62,
        seeds={"birds": SeedConfig(inputs=(InputConfig(kind="folder", path="é/ü"),), retrieve="cluster")},
        accept_licenses=("CC-BY-NC-4.0",),
    )

    dumped = yaml_settings.dump(settings)

    assert load(tmp_path, dumped) == settings
    assert yaml_settings.dump(load(tmp_path, dumped)) == dumped


def test_a_dump_writes_out_every_default():
    dumped = yaml_settings.dump(RunConfig())

    for key in ("max_score: 0.5", "threshold: 0.6", "reference_threshold: 0.45", "timeout_s: 20.0"):
        assert key in dumped


def test_settings_are_frozen():
    with pytest.raises(ValidationError):
        RunConfig().nsfw.max_score = 0.9


def test_every_section_is_frozen_and_refuses_unknown_keys():
    def sections(model):
        yield model
        for subclass in model.__subclasses__():
            yield from sections(subclass)

    for section in sections(Settings):
        assert section.model_config["frozen"], section
        assert section.model_config["extra"] == "forbid", section


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_of_the_package_loads(path):
    settings = yaml_settings.load(RunConfig, path)

    assert yaml_settings.parse(RunConfig, settings.model_dump(mode="json"), path.name) == settings


@pytest.mark.parametrize("path", sorted((CONFIGS / "dinov2").glob("*.yaml")), ids=lambda path: path.name)
def test_every_training_config_of_the_package_loads(path):
    yaml_settings.load(TrainConfig, path)


def test_the_production_config_has_the_numbers_of_the_paper():
    settings = yaml_settings.load(RunConfig, CONFIGS / "lvd142m.yaml")

    assert (settings.dedup.threshold, settings.dedup.reference_threshold) == (0.6, 0.45)
    assert settings.cluster.num_clusters == 100_000
    assert settings.seeds["imagenet22k"].k == 4
    assert (settings.seeds["imagenet1k"].k, settings.seeds["imagenet1k"].as_is) == (32, False)
    clustered = [seeds for seeds in settings.seeds.values() if seeds.retrieve == "cluster"]
    assert clustered
    for seeds in clustered:
        assert (seeds.min_seed_images, seeds.images_per_cluster, seeds.max_images) == (3, 10_000, 1_000_000)


def test_a_preset_gives_the_encoder_and_the_side_may_be_another(tmp_path):
    preset = load(tmp_path, "embed: {preset: dinov2-vits14}").embed
    larger = load(tmp_path, "embed: {preset: dinov2-vits14}", "embed.side_px=518").embed

    assert (preset.model, preset.weights) == ("vit_small_patch14_reg4_dinov2.lvd142m", "hub")
    assert (preset.features, preset.side_px, larger.side_px) == ("cls", 224, 518)
    assert load(tmp_path, yaml_settings.dump(RunConfig(embed=larger))).embed == larger


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("embed: {preset: dinov9}", "there is no preset dinov9; presets: "),
        ("embed: {preset: dinov2-vits14, model: test_vit}", "leave one of them out"),
        ("embed: {preset: dinov2-vits14, weights: a.pth}", "preset dinov2-vits14 has weights hub"),
    ],
)
def test_a_preset_that_does_not_exist_or_is_contradicted_is_an_error(tmp_path, text, says):
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, text)


@pytest.mark.parametrize("levels", [[100], [50, 50], [20, 30], [0], ["auto", 5], ["some"]])
def test_levels_of_clusters_must_shrink(levels):
    with pytest.raises(ConfigError, match="cluster"):
        yaml_settings.parse(RunConfig, {"cluster": {"num_clusters": 100, "levels": levels}}, "x.yaml")


def test_k_means_cannot_say_how_many_clusters_there_are():
    tree = {"cluster": {"num_clusters": 100, "levels": [50, "auto"]}}
    assert yaml_settings.parse(RunConfig, tree, "x.yaml").cluster.levels == (50, "auto")
    tree["cluster"]["linkage"] = "kmeans"
    with pytest.raises(ConfigError, match="auto can only be the last of levels, with linkage average"):
        yaml_settings.parse(RunConfig, tree, "x.yaml")


def test_balanced_selection_without_levels_is_refused_and_told_what_to_set():
    tree = {"retrieve": {"balanced_images": 100}}
    with pytest.raises(ConfigError, match=r"set cluster\.levels, such as \[auto\]") as caught:
        yaml_settings.parse(RunConfig, tree, "x.yaml")
    assert len(caught.value.problems) == 1
    assert len(caught.value.problems[0]) < 400
    assert (
        yaml_settings.parse(RunConfig, tree | {"cluster": {"levels": ["auto"]}}, "x.yaml").retrieve.balanced_images
        == 100
    )


def test_levels_and_a_fit_on_everything_can_be_asked_for():
    tree = {"cluster": {"num_clusters": 100, "levels": [50, 10], "sample_size": None}}
    found = yaml_settings.parse(RunConfig, tree, "x.yaml")

    assert found.cluster.levels == (50, 10)
    assert found.cluster.sample_size is None


def test_paths_of_domain_lists_are_made_absolute(tmp_path):
    policy = PolicyConfig(blocked_domains=("lists/bad.txt",), allowed_domains=("/abs.txt",), blocked_urls=("*/x/*",))

    found = absolute(RunConfig(fetch=FetchConfig(policy=policy)), tmp_path).fetch.policy

    assert found.blocked_domains == (str(tmp_path / "lists/bad.txt"),)
    assert (found.allowed_domains, found.blocked_urls) == (("/abs.txt",), ("*/x/*",))


@pytest.mark.parametrize("proxy", ["http://user:secret@proxy.example:3128", "socks5://proxy.example", "proxy.example"])
def test_a_proxy_is_an_address_without_secrets_and_the_error_repeats_none(tmp_path, proxy):
    (problem,) = problems(tmp_path, f"fetch: {{proxy: '{proxy}'}}")

    assert problem == "my.yaml: fetch.proxy: must be http://host:port, without user name and password"
