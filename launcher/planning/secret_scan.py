"""Finds what looks like a secret, by the rules of detect-secrets, before it is written into a run directory.

A run directory is there to be shared, and its files live as long as the run. Rules that know a token by its form apply
everywhere; those that go by a name or by randomness, which code is full of, only to small files that are no code, and
to shell lines. A line with `pragma: allowlist secret` in it is passed over.
"""

import re
import tempfile
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

from outlast.config.configuration import Config
from outlast.errors import ConfigError

FORMS = (
    "AWSKeyDetector", "AzureStorageKeyDetector", "DiscordBotTokenDetector", "GitHubTokenDetector",
    "GitLabTokenDetector", "JwtTokenDetector", "MailchimpDetector", "NpmDetector", "OpenAIDetector",
    "PrivateKeyDetector", "PypiTokenDetector", "SendGridDetector", "SlackDetector", "SquareOAuthDetector",
    "StripeDetector", "TelegramBotTokenDetector", "TwilioKeyDetector",
)  # fmt: skip
"""Rules of detect-secrets that know a token by its form."""
GUESSES = ("BasicAuthDetector", "Base64HighEntropyString", "HexHighEntropyString", "KeywordDetector")
HEURISTICS = (
    "is_indirect_reference", "is_templated_secret", "is_prefixed_with_dollar_sign", "is_not_alphanumeric_string",
    "is_sequential_string", "is_potential_uuid", "is_likely_id_string",
)  # fmt: skip
"""What detect-secrets takes back: references, templates, counted-up digits and so on. Nothing is asked on a network."""
MORE_FORMS = re.compile(r"\b(?:(?:hf|api_org)_[A-Za-z0-9]{24,}|sk-(?:ant|proj|or|svcacct)-[\w-]{16,}|wandb_v1_\w{16,})")
"""Tokens of Hugging Face, Anthropic, OpenAI and Weights & Biases, which detect-secrets does not know."""
_WORDS = r"API_?KEY|_KEY\b|SECRET|TOKEN(?!I[SZ]|S\b)|PASSW(?:OR)?D|PASSPHRASE|CREDENTIAL|_PAT\b"
_NAME = rf"[A-Z0-9_.-]*(?:{_WORDS})[A-Z0-9_.-]*"
_VALUE = r"""["']?(?P<value>[^\s"',;]{4,})"""
_GIVEN = re.compile(
    rf"(?:(?P<name>{_NAME})=|--?(?P<flag>{_NAME})[= ]\s*|\b(?P<login>login)\s+(?!-)){_VALUE}", re.IGNORECASE
)
_NO_SECRET = re.compile(r"[$`~./-]|\\\$|(?:true|false|none|null|yes|no|[\d.]+)$", re.IGNORECASE)
"""How a value begins that is a variable, a command's output, a path or a flag; or one that is too plain."""
_NOT_VALUES = re.compile(r"_(?:PATH|FILE|DIR|URL|NAME|CMD|COMMAND)$", re.IGNORECASE)
KEYS = re.compile(r"(?:^|[._])(?:hub_token|api_?key|secret|password|passwd)$")
"""Keys of the configuration whose value is a secret, whatever it looks like."""
SMALL, LARGE = 8_192, 1_000_000
"""Bytes up to which a file is read closely, and at all: what is larger is data."""
CODE = (
    ".py", ".pyi", ".pyx", ".ipynb", ".sh", ".bash", ".sbatch", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs",
    ".go", ".js", ".ts", ".md", ".rst", ".lock", ".toml",
)  # fmt: skip
"""Endings of files that are code or prose: left out, a job would lack them."""
SETTINGS = (".yaml", ".yml", ".json", ".jsonl", ".csv", ".tsv", ".cfg", ".ini")
"""Endings of files whose digests, revisions and ids are random, and no secrets."""
WAY = "export it in the shell that you submit from, or read it in a file of yours: `. ~/.my_tokens` in cluster.setup"


def refuse_secrets(config: Config) -> None:
    """Refuse a configuration that holds what looks like a secret; it is written into the run directory.

    Raises:
        ConfigError: it names the key and what was found, not the secret itself.
    """
    for key, value in config.flat().items():
        for text in _texts(value):
            shell = key.startswith(("cluster.setup", "cluster.sbatch", "cluster.srun"))
            if (found := "a secret" if KEYS.search(key) and text else in_text(text, shell=shell)) is not None:
                raise ConfigError(key, found, f"secrets must not be written into a run directory: {WAY}")


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, one in value.items():
            for text in _texts(one):
                yield text
                yield f"{name}={text}"
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def in_patch(text: str) -> bool:
    """Whether a token, known by its form, is in a difference that git has printed."""
    return any(form.search(text) for form in (MORE_FORMS, *_forms()))


@lru_cache(maxsize=4096)
def in_text(text: str, *, shell: bool) -> str | None:
    """What in a text looks like a secret, in words that don't tell it; None: nothing.

    Args:
        shell: it is a shell line or an option, so names and randomness count as well.
    """
    if found := MORE_FORMS.search(text):
        return f"{found.group()[:6]}… (a token)"
    if not shell and len(text) < 20:
        return None
    for match in _GIVEN.finditer(text) if shell else ():
        name, value = match["name"] or match["flag"] or match["login"], match["value"]
        if not _NO_SECRET.match(value) and not _NOT_VALUES.search(name):
            return f"{name}=…"
    if not shell and not re.search(r"[A-Za-z0-9_/+=-]{16}|://[^/\s]*@", text):
        return None  # a short cut: each configuration has a hundred values
    with tempfile.NamedTemporaryFile("w", suffix=".env") as file:
        file.write(text)
        file.flush()
        kinds = _scan(Path(file.name), (*FORMS, "BasicAuthDetector", *(["KeywordDetector"] if shell else [])))
    return next((f"… ({kind})" for kind, _ in kinds), None)


def in_file(path: Path) -> tuple[str, bool] | None:
    """What in a file of a project looks like a secret, as `line 3: Private Key`; None: nothing.

    Returns:
        That, and whether the file is code, which a job would miss.
    """
    size = path.stat().st_size
    if size > LARGE:
        return None
    data = path.read_bytes()
    code = path.suffix in CODE or data.startswith(b"#!")
    if b"\0" in data[:SMALL]:
        return None
    text = data.decode(errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        if MORE_FORMS.search(line) and "pragma: allowlist secret" not in line:
            return f"line {number}: a token", code
    settings = path.suffix in SETTINGS
    if (
        not code
        and not settings
        and size <= SMALL
        and re.fullmatch(r"\s*[\w+/=.-]{20,}\s*", text)
        and re.search(r"\d", text)
    ):
        return "line 1: nothing but a key", code
    close = not code and size <= SMALL
    rules = (*FORMS, *GUESSES) if close and not settings else (*FORMS, "KeywordDetector") if close else FORMS
    if not close and not any(form.search(text) for form in _forms()):
        return None
    found = next(iter(_scan(path, rules)), None)
    return None if found is None else (f"line {found[1]}: {found[0]}", code)


@cache
def _forms() -> list[re.Pattern[str]]:
    """The expressions of `FORMS`: to search a whole file for them is a hundred times as fast as a scan."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    found = get_mapping_from_secret_type_to_class().values()
    return [form for plugin in found if plugin.__name__ in FORMS for form in plugin.denylist]


def _scan(path: Path, rules: tuple[str, ...]) -> list[tuple[str, int]]:
    """The kinds and lines of what detect-secrets finds."""
    from detect_secrets.core.scan import scan_file
    from detect_secrets.settings import transient_settings

    filters = [f"detect_secrets.filters.heuristic.{name}" for name in HEURISTICS]
    filters.append("detect_secrets.filters.allowlist.is_line_allowlisted")
    settings = {
        "plugins_used": [{"name": name} for name in rules],
        "filters_used": [{"path": name} for name in filters],
    }
    with transient_settings(settings):
        return [(secret.type, secret.line_number) for secret in scan_file(str(path))]
