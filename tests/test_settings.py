"""Section 2: each setting by variable and by flag, and one clear line for a bad one."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from kimi_proxy import (
    Settings,
    SettingsError,
    describe_option,
    main,
    make_parser,
    option_flag,
    option_variable,
    unknown_variables,
)

OPTIONS = {option_variable(option): option for option in fields(Settings)}


def read_flags(*arguments: str) -> dict[str, Any]:
    return vars(make_parser("serve").parse_intermixed_args(arguments))


def test_defaults_are_those_that_are_promised() -> None:
    settings = Settings.load({})
    assert (settings.host, settings.port, settings.base_url) == ("127.0.0.1", 8000, "")
    assert (settings.protocol, settings.use_search, settings.cors_origins) == ("auto", True, ("*",))
    assert (settings.auth_url, settings.sources, settings.state_dir) == ("https://auth.kimi.com", "text", "default")
    assert (settings.call_seconds, settings.silence_seconds, settings.answer_seconds) == (15, 120, 1800)
    assert (settings.max_file_mb, settings.max_inline_mb, settings.allow_private_urls) == (100, 32, False)
    assert (settings.drain_seconds, settings.drain_delay_seconds, settings.max_requests) == (30, 0, 256)
    assert settings.max_body_bytes == 32 * 1_048_576 * 4 // 3 + 1_048_576


SECRETS = {variable for variable, option in OPTIONS.items() if option.metadata["secret"]}


def test_secrets_have_no_flag_and_show_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"KIMI_REFRESH_TOKEN", "PROXY_API_KEYS", "KIMI_PROXY_URL"} == SECRETS
    settings = Settings.load(dict.fromkeys(SECRETS, "http://sesame"))
    assert "sesame" not in repr(settings)
    with pytest.raises(SettingsError) as caught:
        Settings.load({"KIMI_PROXY_URL": "sesame"})
    assert "sesame" not in str(caught.value)
    for variable in SECRETS:
        assert (
            main([option_flag(OPTIONS[variable]), "sesame"]) == main([f"{option_flag(OPTIONS[variable])}=sesame"]) == 2
        )
        told = capsys.readouterr().err
        assert told.count("no such option") == 2 and "sesame" not in told


GOOD = {
    "PROXY_HOST": ("0.0.0.0", "0.0.0.0"),
    "PROXY_PORT": ("0", 0),
    "KIMI_BASE_URL": ("http://127.0.0.1:8010/", "http://127.0.0.1:8010"),
    "KIMI_AUTH_URL": ("https://auth.example", "https://auth.example"),
    "KIMI_SOURCES": ("None", "none"),
    "PROXY_STATE_DIR": ("", ""),
    "KIMI_PROTOCOL": ("Classic", "classic"),
    "KIMI_SYSTEM_PROMPT": ("yes", True),
    "KIMI_USE_SEARCH": ("no", False),
    "PROXY_CORS_ORIGINS": ("https://a.example, https://b.example", ("https://a.example", "https://b.example")),
    "PROXY_LOG_LEVEL": ("DEBUG", "debug"),
    "PROXY_MAX_FILE_MB": ("1", 1),
    "PROXY_MAX_INLINE_MB": ("1", 1),
    "PROXY_SPOOL_DIR": (".", "."),
    "KIMI_REFRESH_TOKEN": ("a,b", "a,b"),
    "KIMI_REFRESH_TOKEN_FILE": ("token", "token"),
    "KIMI_WEB_VERSION": ("2.3.0", "2.3.0"),
    "PROXY_API_KEYS": ("me:key", "me:key"),
    "PROXY_API_KEYS_FILE": ("/keys", "/keys"),
    "PROXY_ALLOWED_HOSTS": ("a.example,b.example", ("a.example", "b.example")),
    "PROXY_QUEUE_LENGTH": ("0", 0),
    "PROXY_LOG_FORMAT": ("JSON", "json"),
    "PROXY_LANGUAGE": ("ZH", "zh"),
    "PROXY_MAX_REQUESTS": ("1", 1),
    "KIMI_PROXY_URL": ("http://u:p@127.0.0.1:3128", "http://u:p@127.0.0.1:3128"),
    "PROXY_ALLOW_PRIVATE_URLS": ("1", True),
} | {variable: ("2.5", 2.5) for variable in OPTIONS if variable.endswith("_SECONDS")}
BAD = {
    "PROXY_PORT": ["x", "-1", "65536", "", "8000.5"],
    "KIMI_BASE_URL": [
        "kimi.com",
        "ftp://kimi.com",
        "https://",
        "https://kimi.com?x=1",
        "https://kimi.com#x",
        "https://kimi.com/v1",
        "http://[::1",
    ],
    "KIMI_AUTH_URL": ["x"],
    "KIMI_SOURCES": ["all"],
    "KIMI_PROTOCOL": ["grpc"],
    "KIMI_USE_SEARCH": ["maybe", ""],
    "PROXY_LOG_LEVEL": ["loud"],
    "PROXY_MAX_FILE_MB": ["0", "1e9"],
    "PROXY_MAX_INLINE_MB": ["0", "1e3"],
    "PROXY_QUEUE_LENGTH": ["-1", "many"],
    "PROXY_LOG_FORMAT": ["xml"],
    "PROXY_MAX_REQUESTS": ["0"],
    "KIMI_PROXY_URL": ["socks5://127.0.0.1:1", "x"],
    "PROXY_SPOOL_DIR": ["/no/such/directory", __file__],
    "PROXY_ALLOW_PRIVATE_URLS": ["10.0.0.0/8"],
} | {variable: ["x", "nan", "inf", "-1"] for variable in OPTIONS if variable.endswith("_SECONDS")}


def test_every_setting_has_a_case_here() -> None:
    assert set(GOOD) == set(OPTIONS)


@pytest.mark.parametrize("variable", GOOD)
def test_a_setting_by_variable_by_flag_and_the_flag_wins(variable: str) -> None:
    text, value = GOOD[variable]
    option = OPTIONS[variable]
    assert getattr(Settings.load({variable: text}), option.name) == value
    if variable in SECRETS:
        return
    assert (
        getattr(Settings.load({variable: "nonsense"}, read_flags(f"{option_flag(option)}={text}")), option.name)
        == value
    )


@pytest.mark.parametrize(("variable", "text"), [(variable, text) for variable, texts in BAD.items() for text in texts])
def test_a_bad_value_is_one_line_that_names_it(variable: str, text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load({variable: text})
    assert str(caught.value).startswith(variable) and "\n" not in str(caught.value)
    if variable in SECRETS:
        return
    flag = option_flag(OPTIONS[variable])
    with pytest.raises(SettingsError, match=flag):
        Settings.load({}, read_flags(f"{flag}={text}"))


@pytest.mark.parametrize("text", ["http://host:99999", "http://host:x", "http://host:-1"])
def test_a_port_of_a_url_that_is_not_valid_is_named(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load({"KIMI_BASE_URL": text})
    assert str(caught.value) == f"KIMI_BASE_URL={text!r}: the port is not valid"


def test_help_shows_every_flag_with_its_default_and_variable() -> None:
    text = " ".join(make_parser("serve").format_help().split())
    for variable, option in OPTIONS.items():
        assert (f"{option_flag(option)} " in text and variable in text) is not option.metadata["secret"]
        assert option.metadata["secret"] or f"(default {describe_option(option)[0]}; {variable})" in text.replace(
            "- ", "-"
        )


def test_variables_that_look_like_settings_and_are_none_are_found() -> None:
    environ = {
        "PROXY_ALLOWED_HOST": "x",
        "PROXY_API_KEY": "what ask sends",
        "PROXY_SEND_SECONDS": "1",
        "PROXY_PORT": "1",
        "KIMI_PROTOCOL": "auto",
        "KIMI_PARSE_SECONDS": "",
        "A": "b",
    }
    hint = "PROXY_ALLOWED_HOST (do you mean PROXY_ALLOWED_HOSTS?)"
    assert unknown_variables(environ) == ["KIMI_PARSE_SECONDS", hint, "PROXY_SEND_SECONDS"]
