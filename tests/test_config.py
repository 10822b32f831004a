"""Settings: flags over variables over defaults; a wrong one is a sentence that names it."""

from __future__ import annotations

from dataclasses import fields

import pytest

from reranker_worker.config import Config, ConfigError, env_name, flag_name, load_config, misnamed, parse_value, settings_table

NAMES = [item.name for item in fields(Config)]
NUMBERS = [item.name for item in fields(Config) if type(item.default) is int]
SWITCHES = [item.name for item in fields(Config) if type(item.default) is bool]
CHOICES = [item.name for item in fields(Config) if item.metadata["choices"]]
BOUNDS = {item.name: (item.metadata["low"], item.metadata["high"]) for item in fields(Config) if item.name in NUMBERS}


def load(*argv: str, **environ: str) -> Config:
    return load_config(argv, environ)


def test_nothing_given_means_the_defaults() -> None:
    assert load() == Config()


def test_the_known_host_is_understood() -> None:
    config = load("--model", "org/name", "--batch-size", "16")
    assert (config.model, config.batch_size) == ("org/name", 16)


@pytest.mark.parametrize(
    ("variable", "name"), [("RERANKING_MODEL_PATH", "model"), ("RERANKING_BATCH_SIZE", "batch_size"), ("RERANKING_LOG_LEVEL", "log_level")]
)
def test_the_known_variables_keep_their_names(variable: str, name: str) -> None:
    assert env_name(name) == variable


def test_a_variable_that_looks_like_a_setting_s_and_is_none_is_named_with_the_right_one() -> None:
    (sentence,) = misnamed([*map(env_name, NAMES), "RERANKING_MODEL", "RERANKING_SCRIPT_PATH", "RERANKING_PYTHON", "MODEL_PATHS"])
    assert sentence == "RERANKING_MODEL is no setting and is ignored; did you mean RERANKING_MODEL_PATH?"


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_taken_from_flag_and_variable_within_its_bounds(name: str) -> None:
    low, high = BOUNDS[name]
    for value in (low, high):
        assert getattr(load(flag_name(name), str(value)), name) == value
        assert getattr(load(**{env_name(name): str(value)}), name) == value


@pytest.mark.parametrize("name", NUMBERS)
def test_a_wrong_number_is_refused_with_the_setting_and_what_is_allowed(name: str) -> None:
    low, high = BOUNDS[name]
    for value in (str(low - 1), str(high + 1), "x", "1.5", "1e3", "0x10", "9" * 5000, "-"):
        with pytest.raises(ConfigError) as from_flag:
            load(f"{flag_name(name)}={value}")
        with pytest.raises(ConfigError) as from_variable:
            load(**{env_name(name): value})
        assert flag_name(name) in str(from_flag.value)
        assert env_name(name) in str(from_variable.value)
        for error in (from_flag, from_variable):
            assert f"from {low} to {high}" in str(error.value)
            assert len(str(error.value)) < 300


@pytest.mark.parametrize("name", NAMES)
def test_a_flag_wins_over_its_variable_and_the_variable_over_the_default(name: str) -> None:
    default = getattr(Config(), name)
    if name in SWITCHES:
        first, second = "false", "true"
    elif name in CHOICES:
        first, second = next(item for item in fields(Config) if item.name == name).metadata["choices"][:2]
    elif name in NUMBERS:
        first, second = str(BOUNDS[name][0]), str(BOUNDS[name][1])
    elif name == "device":
        first, second = "cuda:1", "mps"
    else:
        first, second = "one", "two"
    config = load(flag_name(name), first, **{env_name(name): second})
    assert getattr(config, name) == parse_value(name, first, "")
    assert getattr(load(**{env_name(name): second}), name) == parse_value(name, second, "")
    assert getattr(load(), name) == default


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_takes_the_usual_words(name: str) -> None:
    assert getattr(load(flag_name(name)), name) is True
    for word, value in {"1": True, "true": True, "YES": True, "on": True, "0": False, "False": False, "no": False, "off": False}.items():
        assert getattr(load(flag_name(name) + "=" + word), name) is value
        assert getattr(load(**{env_name(name): word}), name) is value
    with pytest.raises(ConfigError, match="true or false"):
        load(flag_name(name) + "=maybe")


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_taken_in_any_case_and_nothing_else_is(name: str) -> None:
    for choice in next(item for item in fields(Config) if item.name == name).metadata["choices"]:
        assert getattr(load(flag_name(name), choice.upper()), name) == choice
        assert getattr(load(flag_name(name), choice.lower()), name) == choice
    with pytest.raises(ConfigError, match="must be one of"):
        load(flag_name(name), "nonsense")


def test_an_empty_flag_is_taken_where_empty_is_the_default_and_refused_elsewhere() -> None:
    assert load_config(["--model-revision", ""], {"RERANKING_MODEL_REVISION": "v1"}).model_revision == ""
    with pytest.raises(ConfigError, match="--model must be"):
        load_config(["--model", ""], {})


def test_an_empty_variable_counts_as_unset() -> None:
    assert load(**{env_name(name): "" for name in NAMES}) == Config()


@pytest.mark.parametrize("value", ["", "a\nb", "a\0b", "\x1b[1m"])
def test_a_model_without_a_name_or_with_control_characters_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="--model"):
        load("--model", value)


@pytest.mark.parametrize("argv", [["--modle", "x"], ["--batch", "4"], ["x"], ["--batch-size"], ["--no-such=1"]])
def test_an_unknown_or_unfinished_flag_is_a_sentence_that_names_help(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match="--help"):
        load(*argv)


def test_unknown_variables_are_ignored() -> None:
    assert load(RERANKING_SCRIPT_PATH="/x", PATH="/bin") == Config()


def test_flags_and_variables_are_all_different() -> None:
    table = settings_table()
    assert len(table) == len(NAMES) == len({row[0] for row in table}) == len({row[1] for row in table})
    assert all(row[1].startswith("RERANKING_") for row in table)


def test_every_default_is_within_its_own_bounds() -> None:
    for name in NUMBERS:
        assert BOUNDS[name][0] <= getattr(Config(), name) <= BOUNDS[name][1]


def test_help_names_every_flag_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        load("--help")
    text = capsys.readouterr().out
    assert leaving.value.code == 0
    assert all(flag_name(name) in text and env_name(name) in text for name in NAMES)


@pytest.mark.parametrize("device", ["one", "cuda:", "cuda:x", "cpu:0", "gpu", "cuda:1234"])
def test_a_device_that_is_none_is_refused_before_anything_is_loaded(device: str) -> None:
    with pytest.raises(ConfigError, match="cuda:N"):
        load("--device", device)
