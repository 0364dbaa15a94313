"""Remove passwords, tokens and keys from text that is shown, logged or recorded."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "..."
# A key whose value is a secret; it may end a longer one: MLFLOW_TRACKING_PASSWORD, aws_secret_access_key.
_KEY = (
    r"(?:passwords?|passwd|passphrase|passcode|(?<![a-z])pass|pwd|secret|token|access[_-]?key(?:[_-]?id)?|account[_-]?key|api[_-]?key|"
    r"private[_-]?key|shared[_-]?access[_-]?key|(?<![a-z])sig|signature|credentials?|odbc_connect)"
)
_PERCENT = r"%(?:25)*"  # a percent sign, itself encoded any number of times
_EQUALS = rf"(?:\s*=\s*|{_PERCENT}3D|{_PERCENT}3A)"
_END = rf"[&;\s'\",)}}\]]|{_PERCENT}(?:3B|26)"
# (what to find, what to put there). The order counts: headers and quoted values before bare ones.
_FORMS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.|\n)*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", HIDDEN),
        # userinfo of an address, plain and percent-encoded
        (r"(?<!/)//(?!/)\S*@", "//"),
        (rf"({_PERCENT}3A{_PERCENT}2F{_PERCENT}2F)\S*?{_PERCENT}40", r"\1"),
        # headers
        (r"(\b(?:proxy-)?authorization['\"]?\s*[:=]\s*)(?:(['\"]).*?\2|(?:\w+\s+)?[^\s'\",;}]+)", rf"\1{HIDDEN}"),
        (r"(\bbearer\s+)[\w.+/=~-]{8,}", rf"\1{HIDDEN}"),
        # whole connection strings of ODBC in an address
        (r"(odbc_connect=)[^&\s'\"]+", rf"\1{HIDDEN}"),
        # values in quotes or braces, then bare ones; `key: value` as in YAML, JSON and error texts
        (rf"({_KEY}\b['\"]?\s*[:=]\s*)(['\"]).*?\2", rf"\1\2{HIDDEN}\2"),
        (rf"({_KEY}\s*=\s*){{[^}}]*}}", rf"\1{HIDDEN}"),
        (r"((?:^|;)\s*(?:pwd|password)\s*=\s*)[^;'\"\n]+(?=;)", rf"\1{HIDDEN}"),
        (rf"({_KEY}{_EQUALS})(?:(?!{_END}).)+", rf"\1{HIDDEN}"),
        (rf"({_KEY}\b['\"]?:\s+)[^\s'\",)}}\]]+", rf"\1{HIDDEN}"),
        # what is a secret by its form
        (r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b", HIDDEN),
        (r"\b(?:gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|dapi[0-9a-f]{32}|hf_\w{20,}|sk-[\w-]{20,})",
         HIDDEN),
        (r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+", HIDDEN),
    )
)  # fmt: skip
# Something of this stands in every text that has a secret; most texts have none of it, and need no closer look.
_SIGN = re.compile(
    r"@|%40|pass|pwd|secret|token|key|sig|cred|odbc|auth|bearer|AKIA|ASIA|gh[pousr]_|github_pat|glpat|dapi|hf_|sk-|eyJ",
    re.IGNORECASE,
)
# Only these count in sources, where `token=token` is everyday code.
_LITERAL = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----|://[^\s/:@'\"{}]*:[^\s/@'\"{}]+@|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|"
    r"\b(?:gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|dapi[0-9a-f]{32}|hf_\w{20,})|"
    r"(?i:(?:password|passwd|passphrase|pwd|secret|token|api_key|access_key)['\"]?\]?\s*[:=]\s*['\"][^'\"{}\s]{6,}['\"])"
)


def redact(text: str) -> str:
    """Return the text without passwords, tokens and keys, by the names of keys and by the form of values."""
    if not _SIGN.search(text):
        return text
    for pattern, replacement in _FORMS:
        text = pattern.sub(replacement, text)
    return text


def redact_tree(value: Any) -> Any:
    """Return dicts, lists and texts with every text redacted, and the value of every key that names a secret."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: HIDDEN if inner and isinstance(inner, str) and re.search(rf"{_KEY}$", str(key), re.IGNORECASE)
                else redact_tree(inner) for key, inner in value.items()}  # fmt: skip
    return [redact_tree(inner) for inner in value] if isinstance(value, list | tuple) else value


def literal_secret(line: str) -> bool:
    """Return whether a line of source code seems to hold a secret itself, not only a variable of that name."""
    return _LITERAL.search(line) is not None
