"""Remove passwords, tokens and keys from text that is shown, logged or recorded, and find them in sources."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

HIDDEN = "..."
# A key whose value is a secret; it may end a longer one: MLFLOW_TRACKING_PASSWORD, aws_secret_access_key.
_KEY = (
    r"(?:passwords?|passwd|passphrase|passcode|(?<![a-z])(?:pass|jwt)|pwd|secret(?:[_-]?key)?|token|"
    r"access[_-]?key(?:[_-]?id)?|account[_-]?key|api[_-]?key|private[_-]?key|shared[_-]?access[_-]?key|credentials?|"
    r"odbc_connect)"
)
_SIGNATURE = r"(?:(?<![a-z])sig|signature)"  # a secret in the query of an address alone
_PERCENT = r"%(?:25)*"  # a percent sign, itself encoded any number of times
_EQUALS = rf"(?:\s*=\s*|{_PERCENT}3D|{_PERCENT}3A)"
_END = rf"[&;\s'\",)}}\]]|{_PERCENT}(?:3B|26)"
# A component of a path begins: `/data/token=5/x` is the name of a folder, as partitioned datasets have.
_IN_PATH = r"(?<![/\\\w.-])(?<![/\\])"
_PORT = r"\d+(?:[/?#\s'\",;)]|$)"
_PEM = r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----"
# Secrets by their form, whatever stands around them. Upper and lower case count.
_TOKEN = (
    r"(?:\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bgl(?:pat|ptt|dt|rt)-[\w-]{16,}|"
    r"\bdapi[0-9a-f]{32}|\bhf_[A-Za-z0-9]{20,}|\bsk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}|"
    r"\b[sr]k_(?:live|test)_[A-Za-z0-9]{16,}|\bxox[a-z]-[\w-]{10,}|\bxapp-[\w-]{10,}|\bAIza[\w-]{35}|\bya29\.[\w-]{20,}|"
    r"\bnpm_[A-Za-z0-9]{30,}|\bpypi-AgE[\w-]{30,}|\bSG\.[\w-]{16,}\.[\w-]{16,}|\bdop_v1_[0-9a-f]{40,}|\bhv[sb]\.\w{20,}|"
    r"\b\d{8,10}:AA[\w-]{32,}|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}(?:\.[\w-]*)?|"
    r"(?<=hooks\.slack\.com/)(?:services|workflows|triggers)/[\w/-]+|(?<=/api/webhooks/)\d+/[\w-]+|"
    r"(?<=/webhookb2/)[^\s'\"]{16,})"
)
_BASIC = (  # base64: with a digit or a padding, as names of things have none
    r"(?=[A-Za-z0-9+/]*[0-9=])(?=\S?[A-Za-z0-9+/]*[A-Z])(?=\S*[a-z])(?=[a-z0-9+/]|[A-Z]+[a-z0-9+/]+[A-Z])"
    r"[A-Za-z0-9+/]{8,}={0,2}"
)
# Words of a command line: an option that takes a secret, and user:password of curl.
_OPTION = rf"--?(?:[a-z]+-)*{_KEY}"
_BARE = r"(?=[^\s'\"]*[\d!#$%^&*+=])[^\s'\"{}<>$-][^\s'\"{}]{3,}"  # with a digit or sign, as prose follows options too
_CURL = r"\bcurl\b[^\n]{0,300}?\s(?:-u|--user|--proxy-user|-U)[ =]*['\"]?[^\s:'\"{}$]+:"
_LISTED_USER = r"['\"](?:-u|--user|--proxy-user|-U)['\"]\s*,\s*f?['\"][^\s:'\"]+:"
_LOGIN_COMMAND = (
    r"\b(?:mysql\w*|mariadb\w*|sshpass|(?:docker|podman|apptainer|twine)\b[^\n;|&]{0,60}?\b(?:login|upload))\b"
    r"[^\n;|&]{0,200}?"
)
_LOGIN = rf"{_LOGIN_COMMAND}\s-p\s*"
_AUTH = r"(?:(?<![a-z])auth\s*=\s*(?:\w+\.)*\w*\(?|\b\w*Auth\w*)\(\s*['\"][^'\"\n]+['\"]\s*,\s*['\"]"

# (what to find, what to put there). The order counts: headers and quoted values before bare ones.
_FORMS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(rf"{_PEM}(?:.|\n)*?(?:-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|\Z)"), HIDDEN),
    (re.compile(_TOKEN), HIDDEN),
    (re.compile(rf"(\b[Bb]asic\s+){_BASIC}"), rf"\1{HIDDEN}"),
    (re.compile(rf"({_LOGIN})['\"]?[^\s'\"{{}}$-][^\s'\"{{}}]{{3,}}"), rf"\1{HIDDEN}"),
    (re.compile(rf"({_CURL})[^\s'\"]+"), rf"\1{HIDDEN}"),
    (re.compile(rf"({_LISTED_USER})[^'\"\n]+"), rf"\1{HIDDEN}"),
    *(
        (re.compile(pattern, re.IGNORECASE), replacement)
        for pattern, replacement in (
            # userinfo of an address, plain, without a scheme, and percent-encoded; an @ in its path is none
            (rf"(?<=:)//(?!/)(?:[^\s/:@]+:(?!{_PORT})\S*@|[^\s/]*@)", "//"),
            (r"(?<![:/])//[^\s/:@]+:[^\s/@]+@", "//"),
            (rf"({_PERCENT}3A{_PERCENT}2F{_PERCENT}2F)\S*?{_PERCENT}40", r"\1"),
            # headers, and pairs of user and password
            (r"(\b(?:proxy-)?authorization['\"]?\s*[:=]\s*)(?:(['\"]).*?\2|(?:\w+\s+)?[^\s'\",;}]+)", rf"\1{HIDDEN}"),
            (r"(\bbearer\s+)(?=[\w.+/=~-]*\d)[\w.+/=~-]{8,}", rf"\1{HIDDEN}"),
            (rf"({_AUTH})[^'\"\n]+", rf"\1{HIDDEN}"),
            # options of a command
            (rf"((?<![\w-]){_OPTION}\s+){_BARE}", rf"\1{HIDDEN}"),
            (rf"(['\"]{_OPTION}['\"]\s*,\s*)(['\"])(?!-)[^'\"\n]+\2", rf"\1\2{HIDDEN}\2"),
            # whole connection strings of ODBC in an address, and signatures in its query
            (r"(odbc_connect=)[^&\s'\"]+", rf"\1{HIDDEN}"),
            (rf"([?&;][\w-]*{_SIGNATURE}=)(?:(?!{_END}).)+", rf"\1{HIDDEN}"),
            # values in quotes or braces, then bare ones; `key: value` as in YAML, JSON and error texts
            (rf"({_KEY}\b['\"]?\]?\s*[:=]\s*)(['\"]).*?\2", rf"\1\2{HIDDEN}\2"),
            (rf"({_KEY}\s*=\s*){{[^}}]*}}", rf"\1{HIDDEN}"),
            (r"((?:^|;)\s*(?:pwd|password)\s*=\s*)[^;'\"\n]+(?=;)", rf"\1{HIDDEN}"),
            (rf"({_IN_PATH}[\w.-]*?{_KEY}{_EQUALS})(?:(?!{_END}).)+", rf"\1{HIDDEN}"),
            (rf"({_IN_PATH}[\w.-]*?{_KEY}\b['\"]?:\s+)[^\s'\",)}}\]]+", rf"\1{HIDDEN}"),
        )
    ),
)
# Something of this stands in every text that has a secret; most texts have none of it, and need no closer look.
_SIGN = re.compile(
    r"@|%40|pass|pwd|secret|token|key|sig|cred|odbc|auth|bearer|basic|AKIA|ASIA|gh[pousr]_|github_pat|gl\w+-|dapi|hf_|"
    r"sk-|[sr]k_|xox|xapp-|AIza|ya29|npm_|pypi-|SG\.|dop_v1|hv[sb]\.|:AA|eyJ|hook|jwt|curl|-u\b|--user|mysql|mariadb|"
    r"login|upload|private|\bpw",
    re.IGNORECASE,
)
_SECRET_KEY = re.compile(rf"(?:{_KEY}|{_SIGNATURE})$", re.IGNORECASE)

# In sources `token=token` is everyday code: only what is written out there counts.
_NAME = (
    r"(?:passwords?|passwd|passphrase|passcode|(?<![a-z])(?:pw|pass|jwt)_?|pwd|secret(?:[_-]?key)?|token|api[_-]?key|"
    r"access[_-]?key|account[_-]?key|private[_-]?key)"
)
_VALUE = r"[bfru]{0,2}(?:'''|\"\"\"|['\"])(?!\.\.\.|--|(?-i:[A-Z]+_[A-Z_]+)['\"])[^'\"{}\s<$][^'\"{}\s]{5,}['\"]"
_LITERALS: tuple[re.Pattern[str], ...] = (
    re.compile(rf"{_PEM}|{_TOKEN}"),
    re.compile(r"://[^\s/:@'\"{}]*:[^\s/@'\"{}]+@|://[A-Za-z0-9_-]{16,}@"),
    # name = "value", name: str = "value", "name": "value", environ["NAME"] = "value", os.getenv("NAME", "value")
    re.compile(rf"(?i:{_NAME}(?:['\"]?\]?\s*[:=]\s*|\s*:[\w\s|\[\].]+=\s*)\(?{_VALUE})"),
    re.compile(r"(?i:(?:pass(?:word|wd|phrase)|\bpwd)['\"]?\]?\s*=\s*\(?[bfru]{0,2}['\"][^'\"{}\n]{6,}['\"])"),
    re.compile(rf"(?i:(?:setdefault|environ\.get|getenv|putenv|setenv)\(\s*['\"]\w*{_NAME}['\"]\s*,\s*{_VALUE})"),
    re.compile(rf"(?i:set_password\(.*,\s*{_VALUE}\s*\)|['\"]{_OPTION}['\"]\s*,(?:.*\bdefault=)?\s*{_VALUE})"),
    # long random values of keys that are often harmless
    re.compile(
        r"(?i:(?<![a-z])(?:key|auth|credentials?|cookie|session)\w*['\"]?\]?\s*[:=]\s*"
        r"[bru]?['\"](?=(?:[^'\"]*\d){3})(?=[^'\"]*[a-z])[\w+/=.-]{24,}['\"])"
    ),
    # headers, pairs of user and password, commands, connection strings, addresses
    re.compile(r"(?i:authorization['\"]?\]?\s*[:=,]\s*f?['\"]?\w+\s+(?!\.\.\.)[^\s'\"{}]{6,})"),
    re.compile(rf"\b[Bb]asic\s+{_BASIC}|\b[Bb]earer\s+(?=\S*\d)[\w.+/=~-]{{12,}}"),
    re.compile(rf"(?:{_AUTH}|\.login\(\s*['\"][^'\"]+['\"]\s*,\s*['\"])[^'\"{{}}\n]{{4,}}['\"]"),
    re.compile(rf"(?:{_CURL}|{_LISTED_USER})[^\s'\"{{}}$]{{3,}}"),
    re.compile(_LOGIN_COMMAND + r"[\s'\"]-p['\",\s]*(?=\S*[^\W_])[^\s'\"{}$-][^\s'\"{}]{3,}"),
    re.compile(rf"(?i:(?<![\w-]){_OPTION}\s+){_BARE}|(?i:(?<![\w-]){_OPTION}=)[^\s'\"{{}}<$-][^\s'\"{{}}]{{3,}}"),
    re.compile(rf"(?i:[;'\"]\s*(?:pwd|password|{_NAME})=[^;&'\"{{}}\s<$][^;&'\"{{}}\s]{{3,}})"),
    re.compile(rf"(?i:[?&](?:[\w-]*(?:{_NAME}|{_SIGNATURE})|key)=[^&\s'\"{{}}<$.]{{6,}})"),
    re.compile(r"\b[A-Z_]*(?:PASSWORD|SECRET|TOKEN|API_KEY|ACCESS_KEY)=['\"]?[^\s'\"{}<>$.,)][^\s'\"{}<>$,)]{3,}"),
)


def redact(text: str) -> str:
    """Return the text without passwords, tokens and keys, by the names of keys and by the form of values."""
    if not _SIGN.search(text):
        return text
    for pattern, replacement in _FORMS:
        text = pattern.sub(replacement, text)
    return text


def redact_tree(value: Any) -> Any:
    """Return dicts, lists and texts with every text redacted, and the value of every key that names a secret.

    Such a value is hidden where it is a number, a list or a dict as well, unless it is empty or a switch.
    """
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {
            key: HIDDEN if _says_something(inner) and _SECRET_KEY.search(str(key)) else redact_tree(inner)
            for key, inner in value.items()
        }
    return [redact_tree(inner) for inner in value] if isinstance(value, list | tuple) else value


def _says_something(value: Any) -> bool:
    return not isinstance(value, bool) and value not in (None, "", [], {}, ())


def redacted_keys(before: Any, after: Any, name: str = "") -> Iterator[str]:
    """Yield the dotted names of the keys whose values differ after `redact_tree`."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            yield from redacted_keys(value, after[key], f"{name}.{key}" if name else str(key))
    elif before != after:
        yield name


def literal_secret(line: str, name: str = "x.py") -> bool:
    """Return whether a line of a source file seems to hold a secret itself, not only a variable of that name.

    A file that is no program, such as dvc.yaml, has no variables.
    """
    if not name.endswith((".py", ".html")) and redact(line) != line:
        return True
    return _SIGN.search(line) is not None and any(pattern.search(line) for pattern in _LITERALS)
