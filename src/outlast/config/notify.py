"""Who is told how a run ended."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from .section import Passes, Section

VALID = "the name of an environment variable"
URL = (
    "a URL holds secrets, and this would be written into the run directory; valid: notify.env=NAME, "
    "the name of an environment variable that holds it (export OUTLAST_NOTIFY_URL=… needs no key at all)"
)


@dataclass(kw_only=True)
class NotifySection(Section):
    """Who is told how a run ended, by the library apprise: mail, chat, a webhook."""

    gone = dict.fromkeys(("url",), URL)
    private = True

    env: Annotated[str, Passes(lambda name: re.fullmatch(r"[A-Za-z_]\w*", name), VALID)] = "OUTLAST_NOTIFY_URL"
    """Name of the environment variable that holds apprise's URLs, since they hold secrets; not set: nobody is told."""
    when: list[Literal["finished", "failed", "gave_up", "notice_short"]] = field(
        default_factory=lambda: ["finished", "failed", "gave_up", "notice_short"]
    )
    """What they are told. `gave_up`: restarts made no progress; `notice_short`: a preemption leaves no time to save."""
