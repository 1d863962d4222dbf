"""A chat model behind an OpenAI-compatible HTTP endpoint: one request, answered in spite of passing failures."""

import email.utils
import http.client
import json
import logging
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib import error, parse, request

from evaluation.base import EvaluationError
from utils.errors import InputError

LONGEST_WAIT = 120.0  # seconds before a request is made again, whatever the server asks for
PASSING = (408, 409, 425, 429)  # what a client may try again; so are all of 500 and above

logger = logging.getLogger(__name__)


class JudgeError(EvaluationError):
    """The endpoint cannot be reached or does not keep the protocol, although it was tried several times."""


class _PassingFailure(Exception):
    """A failure that may be over when the request is made again, after `wait` seconds or more."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class _NoRedirect(request.HTTPRedirectHandler):
    """Redirects become errors: a followed one would turn the request into a GET and carry the key to another host."""

    def redirect_request(self, *args: object) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """`{base_url}/chat/completions` and the model asked for there. The key is in no message and no repr.

    `timeout`: seconds of silence until a connection counts as cut; `retries`: further attempts after a passing failure,
    the first after some `base_delay` seconds and each after twice the time of the one before.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 180.0
    retries: int = 6
    base_delay: float = 1.0
    max_tokens: int = 2048

    def complete(self, messages: Sequence[dict]) -> str:
        """What the model replies at temperature 0.

        Raises InputError at once for what the user can mend (key, address, model), JudgeError when the retries are
        used up.
        """
        for attempt in range(self.retries):
            try:
                return self._ask(messages)
            except _PassingFailure as failure:
                spread = self.base_delay * 2**attempt * random.uniform(0.5, 1.0)  # so that clients do not come in step
                wait = min(max(spread, failure.wait), LONGEST_WAIT)
                logger.info("judge at %s: %s; again in %.1f s", self.base_url, failure, wait)
                time.sleep(wait)
        try:
            return self._ask(messages)
        except _PassingFailure as failure:
            raise JudgeError(f"judge at {self.base_url}: {failure} ({self.retries + 1} attempts)") from None

    def check(self) -> None:
        """Ask for next to nothing, once, so that a wrong key or model is known early.

        Raises InputError if the endpoint refuses; that it cannot be reached now is logged only: it may be up later.
        """
        try:
            self._ask([{"role": "user", "content": "Reply with the word: ready"}])
        except _PassingFailure as failure:
            logger.warning("judge at %s: %s; it will be tried again when there are answers", self.base_url, failure)

    def _ask(self, messages: Sequence[dict]) -> str:
        body = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": self.max_tokens}
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        url = f"{self.base_url}/chat/completions"
        asked = request.Request(url, json.dumps(body).encode(), headers, method="POST")
        try:
            with request.build_opener(_NoRedirect).open(asked, timeout=self.timeout) as response:
                return self._content(response.read())
        except error.HTTPError as failure:
            with failure:
                raise self._refusal(failure) from None
        except (OSError, http.client.HTTPException) as failure:
            reason = getattr(failure, "reason", None) or failure
            raise _PassingFailure(self._in_short(f"{type(reason).__name__}: {reason}")) from None

    def _content(self, body: bytes) -> str:
        """The text of a reply; empty where the model said nothing."""
        try:
            content = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            shown = self._in_short(body.decode("utf-8", "replace"))
            raise _PassingFailure(f"the reply is not one of the chat completions protocol: {shown}") from None
        return self._without_key(content) if isinstance(content, str) else ""

    def _refusal(self, failure: error.HTTPError) -> Exception:
        """The exception for a status that is not success."""
        code = failure.code
        try:
            said = self._in_short(_error_message(failure.read()))
        except (OSError, http.client.HTTPException):
            said = "and the connection was cut"
        if code in PASSING or code >= 500:
            return _PassingFailure(f"status {code} {said}", _retry_after(failure.headers.get("Retry-After")))
        if code in (401, 403):
            return InputError(f"--judge_api_key_env: {self.base_url} does not accept the key (status {code} {said})")
        if code < 400:
            return InputError(f"--judge_base_url {self.base_url}: redirects (status {code}); give the final address")
        if code in (404, 405):
            return InputError(
                f"--judge_base_url {self.base_url}: has no /chat/completions, or no model {self.model} for "
                f"--judge_model (status {code} {said})"
            )
        return InputError(f"--judge_model {self.model}: {self.base_url} refuses the request (status {code} {said})")

    def _in_short(self, text: str) -> str:
        """A text of the server's as part of one line."""
        return " ".join(self._without_key(text).split())[:200]

    def _without_key(self, text: str) -> str:
        """`text` without the key, should a server echo it."""
        return text if self.api_key is None else text.replace(self.api_key, "***")


def open_endpoint(base_url: str, model: str | None, api_key_env: str | None) -> Endpoint:
    """The endpoint of `--judge_base_url`, `--judge_model` and `--judge_api_key_env`; nothing is sent yet.

    Raises InputError for an address that is none or that holds secrets, and for a variable without a usable key.
    """
    if "@" in base_url:
        raise InputError("--judge_base_url: must not hold a password; give a key with --judge_api_key_env")
    if not _is_address(base_url):
        raise InputError("--judge_base_url: must be like https://host/v1, without a query")
    if not model:
        raise InputError("--judge_model: missing; name the model to ask at --judge_base_url")
    return Endpoint(base_url.rstrip("/"), model, _key(api_key_env))


def _is_address(url: str) -> bool:
    """Whether `url` is of http or https, with a host, and a path can be appended to it."""
    try:
        parts = parse.urlsplit(url)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    printable = url.isascii() and url.isprintable() and " " not in url
    return printable and parts.scheme in ("http", "https") and has_host and not parts.query and not parts.fragment


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(f"--judge_api_key_env {variable}: there is no such environment variable, or it is empty")
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"--judge_api_key_env {variable}: its value cannot be sent as a key")
    return key


def _error_message(body: bytes) -> str:
    """What a server says about an error: the protocol's message, else the text as it is."""
    text = body.decode("utf-8", "replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return text


def _retry_after(value: str | None) -> float:
    """Seconds to wait by a Retry-After header, which holds seconds or a date; 0 if it says nothing."""
    if value is None:
        return 0.0
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0
