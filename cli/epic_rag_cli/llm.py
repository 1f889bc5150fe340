"""Language models behind an OpenAI-compatible endpoint, and the citations in what they answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from epic_rag.errors import ConfigError, EpicError

__all__ = ["ChatEndpoint", "CitationChecker", "EndpointError", "Message"]

Message = dict[str, str]
"""A message of a chat: "role" and "content"."""

_CONNECT_SECONDS = 5.0
_SILENT_SECONDS = 300.0  # a large model on a CPU reads a prompt for minutes
_MAX_ERROR = 300


class EndpointError(EpicError):
    """The endpoint cannot be reached, refuses, or answers with something else."""


class ChatEndpoint:
    """The chat completions of an endpoint.

    Args:
        url: Its address: http://127.0.0.1:11434 (Ollama) or https://host/v1.
        key: API key.

    Raises:
        ConfigError: If the address is not one, or the key would go to another machine without encryption.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        import httpx  # slow, and only this command needs it

        try:
            parts = urlsplit(url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None
            is_here = parts.hostname in ("localhost", "127.0.0.1", "::1")
            _ = parts.port
        except ValueError:
            is_address = is_here = False
        if not is_address:
            raise ConfigError(f"{url} is not the address of an endpoint. Write one like http://127.0.0.1:11434/v1.")
        if key is not None and parts.scheme == "http" and not is_here:
            raise ConfigError(f"{url} is another machine without encryption, so no key is sent. Use https.")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ConfigError("The API key has characters that no header can hold. Set the variable to the bare key.")
        base = url.rstrip("/").removesuffix("/chat/completions")
        # Ollama and llama.cpp print their address without the path.
        self.url = f"{base}/v1" if not parts.path.strip("/") else base
        self._client = httpx.Client(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(_SILENT_SECONDS, connect=_CONNECT_SECONDS),
            trust_env=not is_here,  # no proxy to this machine
        )

    def __enter__(self) -> ChatEndpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def model(self) -> str:
        """Return the name of the endpoint's model, if it has only one.

        Raises:
            EndpointError: If it cannot be reached, or has none or several.
        """
        with self._request("GET", "/models") as response:
            listed = self._object(response).get("data")
        try:
            names = [str(each["id"]) for each in listed or ()]
        except (TypeError, KeyError):
            names = []
        if len(names) == 1:
            return names[0]
        if not names:
            raise EndpointError(f"{self.url} lists no models. Pass --llm-model.")
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise EndpointError(f"{self.url} has {len(names)} models. Pass one of {shown} to --llm-model.")

    def complete(self, model: str, messages: Sequence[Message]) -> Iterator[str]:
        """Yield the parts of the answer to a chat as they arrive.

        Args:
            model: The model's name.
            messages: The chat.

        Raises:
            EndpointError: If the endpoint cannot be reached, refuses, breaks off, or does not answer in OpenAI's shape.
        """
        body = {"model": model, "messages": list(messages), "stream": True, "temperature": 0}
        with self._request("POST", "/chat/completions", body) as response:
            if "text/event-stream" not in response.headers.get("content-type", ""):
                yield self._text(self._object(response), "message")
                return
            for line in self._lines(response):
                # Server-sent events; lines of other fields and comments are skipped.
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data == "[DONE]":
                    return
                if data:
                    try:
                        event = json.loads(data)
                    except ValueError:
                        raise self._strange() from None
                    yield self._text(event, "delta")
            # Some endpoints end without [DONE].

    def _request(self, method: str, path: str, body: Any = None) -> _Response:
        return _Response(self, method, path, body)

    def _lines(self, response: Any) -> Iterator[str]:
        import httpx

        try:
            yield from response.iter_lines()
        except httpx.HTTPError as error:
            raise EndpointError(f"{self.url} broke off ({_reason(error)}). Try again.") from None

    def _object(self, response: Any) -> dict[str, Any]:
        import httpx

        try:
            response.read()
            found = response.json()
        except httpx.HTTPError as error:
            raise EndpointError(f"{self.url} broke off ({_reason(error)}). Try again.") from None
        except ValueError:
            raise self._strange() from None
        if not isinstance(found, dict):
            raise self._strange()
        return found

    def _text(self, event: Any, part: str) -> str:
        """Return the text of a completion or of a part of one; events with other information have none."""
        try:
            if event.get("error"):
                raise EndpointError(f"{self.url} failed: {_shown(event)}. Look at its log.")
            choices = event.get("choices") or []
            return (choices[0].get(part) or {}).get("content") or "" if choices else ""
        except (AttributeError, TypeError, KeyError, IndexError):
            raise self._strange() from None

    def _strange(self) -> EndpointError:
        return EndpointError(f"{self.url} does not answer in the shape of OpenAI's API. Pass another --llm.")

    def refusal(self, status: int, content: bytes) -> EndpointError:
        """Return the error for a response with another status than 200."""
        try:
            reason = _shown(json.loads(content))
        except (ValueError, AttributeError):
            reason = ""
        reason = f": {reason}" if reason else ""
        remedy = {
            401: "Put its API key into the variable that --llm-key-env names",
            403: "Put its API key into the variable that --llm-key-env names",
            404: "Check --llm and --llm-model",
            413: "Lower --max-context",
            429: "Try again later",
        }.get(status, "Lower --max-context, or look at its log")
        return EndpointError(f"{self.url} refused the request (status {status}{reason}). {remedy}.")


class _Response:
    """A streamed response with status 200, as a context manager."""

    def __init__(self, endpoint: ChatEndpoint, method: str, path: str, body: Any) -> None:
        self._endpoint = endpoint
        self._stream = endpoint._client.stream(method, endpoint.url + path, json=body)

    def __enter__(self) -> Any:
        import httpx

        endpoint = self._endpoint
        try:
            response = self._stream.__enter__()
        except httpx.HTTPError as error:
            raise EndpointError(
                f"{endpoint.url} does not answer ({_reason(error)}). Start the model's server, or pass another --llm."
            ) from None
        if response.status_code != 200:
            try:
                content = response.read()
            except httpx.HTTPError:
                content = b""
            self._stream.__exit__(None, None, None)
            raise endpoint.refusal(response.status_code, content)
        return response

    def __exit__(self, *error: Any) -> None:
        self._stream.__exit__(*error)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _shown(event: Any) -> str:
    """Return the message of an error of OpenAI's, Ollama's or FastAPI's shape."""
    error = event.get("error") or event.get("detail") or ""
    text = error.get("message", "") if isinstance(error, dict) else error
    return str(text).strip().rstrip(".")[:_MAX_ERROR]


class CitationChecker:
    """Marks citations of sources that do not exist, in a text that arrives in parts.

    `[1]`, `[1, 3]` and `[2-4]` are citations, except in code between backticks.

    Args:
        sources: The number of sources.

    Attributes:
        cited: Numbers of sources that the text cites, in the order of their first citation.
        invented: Numbers that are no source, likewise.
    """

    _CITATION = re.compile(
        r"\[\s*(?:source\s+|#)?\d{1,4}(?:\s*[,;\u2013-]\s*(?:source\s+|#)?\d{1,4})*\s*\]", re.IGNORECASE
    )
    _LONGEST = 80

    def __init__(self, sources: int) -> None:
        self._sources = sources
        self._waiting = ""
        self._in_code = False
        self.cited: list[int] = []
        self.invented: list[int] = []

    def feed(self, part: str) -> str:
        """Return the text that is complete after another part."""
        return self._take(self._waiting + part, is_end=False)

    def end(self) -> str:
        """Return the rest of the text."""
        return self._take(self._waiting, is_end=True)

    def _take(self, text: str, *, is_end: bool) -> str:
        shown, place = [], 0
        while place < len(text):
            bracket = text.find("[", place)
            if bracket < 0:
                bracket = len(text)
            before = text[place:bracket]
            self._in_code ^= before.count("`") % 2 == 1
            shown.append(before)
            place = bracket
            if place == len(text):
                break
            found = self._CITATION.match(text, place)
            if found is None and not is_end and "]" not in text[place:] and len(text) - place < self._LONGEST:
                break  # the rest may come
            if found is None or self._in_code:
                shown.append("[")
                place += 1
            else:
                shown.append(self._checked(found[0]))
                place = found.end()
        self._waiting = text[place:]
        return "".join(shown)

    def _checked(self, citation: str) -> str:
        numbers: list[int] = []
        for first, last in re.findall(r"(\d+)(?:\s*[\u2013-]\s*(?:source\s+|#)?(\d+))?", citation, re.IGNORECASE):
            start, end = int(first), int(last or first)
            numbers += range(start, end + 1) if start <= end <= start + self._sources else [start, end]
        wrong = [number for number in dict.fromkeys(numbers) if not 1 <= number <= self._sources]
        self.cited += [each for each in dict.fromkeys(numbers) if each not in wrong and each not in self.cited]
        self.invented += [each for each in wrong if each not in self.invented]
        if not wrong:
            return citation
        right = "".join(f"[{each}]" for each in dict.fromkeys(numbers) if each not in wrong)
        return f"{right}[no source {', '.join(map(str, wrong))}]"
