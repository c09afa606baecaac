"""Which environment variables hold secrets, by their names: one rule for what is forwarded, written and refused."""

from __future__ import annotations

import re

_WORDS = frozenset(
    {
        *("KEY", "KEYS", "PASS", "PASSCODE", "PWD", "PW", "BINDPW", "AUTH", "OAUTH", "AUTHORIZATION", "JWT", "PAT"),
        *("COOKIES", "CREDENTIALS", "CRED", "CREDS", "DSN", "WEBHOOK"),
    }
)
"""Words that stand alone between underscores: MONKEY and NCCL_IB_PKEY hold no key."""
_ENDINGS = (
    *("TOKEN", "SECRET", "SECRETS", "PASSWORD", "PASSWORDS", "PASSWD", "PASSPHRASE"),
    *("CREDENTIAL", "COOKIE", "APIKEY", "ACCESSKEY", "SECRETKEY", "PRIVATEKEY"),
)
"""Words that also count at the end of another one: PGPASSWORD, AUTHTOKEN. TOKENIZERS and MAX_TOKENS are not among
them."""
_PLACES = frozenset({"PATH", "FILE", "DIR", "SOCK", "MODE"})
"""A name that ends with one of these says where a secret is, or how it is used."""
_SWITCHES = frozenset({"DISABLE", "ENABLE"})
_NOT_SECRET = frozenset({"PWD", "OLDPWD"})
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name holds a secret, as HF_TOKEN and DS_DB_PASSWD do."""
    if name in _NOT_SECRET:
        return False
    words = [word.rstrip("0123456789") for word in re.split(r"[_\W]+", _HUMP.sub("_", name).upper())]
    if words[-1] in _PLACES or _SWITCHES & set(words):
        return False
    return any(word in _WORDS or word.endswith(_ENDINGS) for word in words)
