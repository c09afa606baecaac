"""Recognises secret environment variables by name: one rule for what is forwarded, written and refused."""

from __future__ import annotations

import re

_WORDS = frozenset(
    {
        *("KEY", "KEYS", "PASS", "PASSCODE", "PWD", "PW", "BINDPW", "AUTH", "OAUTH", "AUTHORIZATION", "JWT", "PAT"),
        *("COOKIES", "CREDENTIALS", "CRED", "CREDS", "DSN", "WEBHOOK"),
    }
)
"""Secret only as whole words between underscores: MONKEY and NCCL_IB_PKEY are not secrets."""
_ENDINGS = (
    *("TOKEN", "SECRET", "SECRETS", "PASSWORD", "PASSWORDS", "PASSWD", "PASSPHRASE"),
    *("CREDENTIAL", "COOKIE", "APIKEY", "ACCESSKEY", "SECRETKEY", "PRIVATEKEY"),
)
"""Secret also at the end of a longer word: PGPASSWORD, AUTHTOKEN; not TOKENIZERS or MAX_TOKENS."""
_PLACES = frozenset({"PATH", "FILE", "DIR", "SOCK", "MODE"})
"""A name that ends with one of these gives the location of a secret, or how it is used."""
_SWITCHES = frozenset({"DISABLE", "ENABLE"})
_NOT_SECRET = frozenset({"PWD", "OLDPWD"})
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def is_secret(name: str) -> bool:
    """Whether an environment variable with this name contains a secret, like HF_TOKEN and DS_DB_PASSWD."""
    if name in _NOT_SECRET:
        return False
    words = [word.rstrip("0123456789") for word in re.split(r"[_\W]+", _HUMP.sub("_", name).upper())]
    if words[-1] in _PLACES or _SWITCHES & set(words):
        return False
    return any(word in _WORDS or word.endswith(_ENDINGS) for word in words)
