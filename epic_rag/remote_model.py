"""Remote embedding models: OpenAI's, Ollama's, text-embeddings-inference's and Cohere's wire shapes.

    openai:NAME[@URL]    POST {URL}/embeddings; vLLM, NIM, LM Studio, llama.cpp and others take the same requests
    ollama:NAME[@URL]    POST {URL}/api/embed
    tei:URL              POST {URL}/embed
    cohere:NAME[@URL]    POST {URL}/v2/embed

Options follow the URL as in a query string: `openai:nv-embedqa@http://host:8000/v1?roles=input_type&dimensions=512`.

    dimensions        width that the service is asked for
    roles             "input_type": a field with "query" or "passage"; "suffix": NAME-query and NAME-passage
    query_prompt      text before a query; by default that of the model's family
    document_prompt   text before a document
    max_tokens        longest text in tokens that the service reads
    reader            folder with a reader that `epic-rag train reader` wrote

Keys come from the environment only. The fingerprint holds the model's name, not its URL, and what the model returned
for three fixed texts: a service that has changed its model behind a name is noticed.
"""

from __future__ import annotations

import base64
import math
import os
import random
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import httpx
import numpy as np

from epic_rag.embedding_model import REMOTE_KINDS, EmbeddingModel, Fact, Role, Vectors, join_unique
from epic_rag.errors import ConfigError, RemoteModelError, reason_of
from epic_rag.model_conventions import fill_instruction, find_convention
from epic_rag.reader import READER_FILE

__all__ = ["RemoteModel", "RemoteName"]

_URLS = {
    "openai": "https://api.openai.com/v1",
    "ollama": "http://127.0.0.1:11434",
    "cohere": "https://api.cohere.com",
}
_KEYS = {
    "openai": ("OPENAI_API_KEY",),
    "ollama": ("OLLAMA_API_KEY",),
    "tei": ("TEI_API_KEY", "HF_TOKEN"),
    "cohere": ("COHERE_API_KEY", "CO_API_KEY"),
}
# Most texts in a request; Cohere refuses more than 96 and text-embeddings-inference more than 32 by default.
_BATCHES = {"openai": 256, "ollama": 64, "tei": 32, "cohere": 96}
# Characters in a request: OpenAI takes 300,000 tokens, text-embeddings-inference a body of 2 MB.
_BATCH_CHARACTERS = 400_000
_OPTIONS = ("dimensions", "roles", "query_prompt", "document_prompt", "max_tokens", "reader")
_PROBES = (
    "How do I restore a backup of the database?",
    "Stop the server, copy the files of the last night back and start it again.",
    "The recipe needs flour, water, salt and patience.",
)
_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_TRIES = 6
_LONGEST_PAUSE = 60.0
_SECONDS = httpx.Timeout(120.0, connect=10.0)
_DEFAULT_MAX_TOKENS = 512
# A word piece of English has about four characters; a text is cut to this many a token if a service refuses its length.
_CHARACTERS_PER_TOKEN = 4
_SHOWN = 160


@dataclass(frozen=True)
class RemoteName:
    """A remote model's name, taken apart.

    Attributes:
        kind: "openai", "ollama", "tei" or "cohere".
        model: The model's name at the service; "" for text-embeddings-inference, which serves one.
        url: Address without a slash at the end.
        options: The options behind the URL.
    """

    kind: str
    model: str
    url: str
    options: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> RemoteName:
        """Parse a name such as `ollama:nomic-embed-text@http://host:11434`.

        Raises:
            ConfigError: If a part is missing or unknown.
        """
        kind, _, rest = text.partition(":")
        if kind not in REMOTE_KINDS:
            raise ConfigError(f"Unknown kind of remote model {kind!r}. Use {', '.join(REMOTE_KINDS)}.")
        body, _, query = rest.partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        unknown = ", ".join(sorted(set(options) - set(_OPTIONS)))
        if unknown:
            raise ConfigError(f"Unknown option {unknown} in {text!r}. Known are {', '.join(_OPTIONS)}.")
        if kind == "tei":
            model, url = "", body
        else:
            model, mark, url = body.partition("@http")
            url = f"http{url}"
            if not mark:
                given = os.environ.get("OLLAMA_HOST", "") if kind == "ollama" else os.environ.get("OPENAI_BASE_URL", "")
                url = given if kind in ("ollama", "openai") and given else _URLS[kind]
                url = url if "://" in url else f"http://{url}"
            if not model:
                raise ConfigError(f"{text!r} names no model. Write {kind}:NAME@URL.")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"{text!r} has no address. Write {'tei:http://HOST:PORT' if kind == 'tei' else kind + ':NAME@http://HOST:PORT'}."
            )
        if parts.username or parts.password:
            raise ConfigError(f"The address in {kind}:{model} holds a password. Set {_KEYS[kind][0]} instead.")
        if options.get("roles", "none") not in ("none", "input_type", "suffix"):
            raise ConfigError(f"roles is {options['roles']!r}. Use input_type, suffix or none.")
        for name in ("dimensions", "max_tokens"):
            if name in options and not (options[name].isdecimal() and int(options[name]) > 0):
                raise ConfigError(f"{name} is {options[name]!r}. Pass a number above 0.")
        folder = options.get("reader")
        if folder is not None and not (Path(folder) / READER_FILE).is_file():
            raise ConfigError(f"reader is {folder!r}, which has no {READER_FILE}. Run `epic-rag train reader`.")
        return cls(kind, model, url.rstrip("/"), options)


class RemoteModel(EmbeddingModel):
    """An embedding model behind HTTP.

    Args:
        name: See the module's head.
        max_query_tokens: Longest query in tokens; None for the service's limit.
        max_document_tokens: Longest document in tokens; None for the service's limit.
        transport: Of httpx, for proxies of one's own.

    Raises:
        ConfigError: If the name cannot be read.
        RemoteModelError: If the service does not answer with vectors.
    """

    kind: ClassVar[str] = "remote"

    def __init__(
        self,
        name: str,
        *,
        max_query_tokens: int | None = None,
        max_document_tokens: int | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.remote = remote = RemoteName.parse(name)
        self._given = name
        key = next((os.environ[each] for each in _KEYS[remote.kind] if os.environ.get(each)), None)
        self._client = httpx.Client(
            headers={"authorization": f"Bearer {key}"} if key else {}, timeout=_SECONDS, transport=transport
        )
        weakref.finalize(self, self._client.close)
        self._served, longest, self._batch = self._ask_limits()
        self.name = f"{remote.kind}:{remote.model or self._served}"
        convention = find_convention(remote.model or self._served)
        self._prompts_source = "the name's options"
        prompts = {"query": "", "document": ""}
        # Services of these kinds apply the prompts of a role themselves.
        self._roles = remote.options.get("roles", "input_type" if remote.kind == "cohere" else "none")
        if convention is not None and self._roles == "none":
            prompts = {"query": convention.query, "document": convention.document}
            self._prompts_source = f"guessed from its name: {convention.source}"
        elif not {"query_prompt", "document_prompt"} & set(remote.options):
            self._prompts_source = "none; the service applies its own" if self._roles != "none" else "none is known"
        self.query_prompt = remote.options.get("query_prompt", prompts["query"])
        self.document_prompt = remote.options.get("document_prompt", prompts["document"])
        limit = int(remote.options.get("max_tokens", longest))
        self.max_query_tokens = max_query_tokens or limit
        self.max_document_tokens = max_document_tokens or limit
        self._limit_is_known = "max_tokens" in remote.options or longest != _DEFAULT_MAX_TOKENS
        self._probe = self.embed(_PROBES, "document")
        self.dimension = self._probe.shape[1]

    def embed(
        self,
        texts: Sequence[str],
        role: Role,
        *,
        instruction: str | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> Vectors:
        """Embed texts by the service; equal texts are sent once. See `EmbeddingModel.embed`.

        Raises:
            RemoteModelError: If the service does not answer, refuses, or answers with something else.
        """
        from tqdm import tqdm

        prompt = fill_instruction(self.query_prompt, instruction) if role == "query" else self.document_prompt
        # Services refuse an empty text, and half a surrogate pair is no character.
        whole = [prompt + (text.encode("utf-8", "replace").decode("utf-8") or " ") for text in texts]
        unique, places = join_unique(whole)
        if not unique:
            return np.empty((0, getattr(self, "dimension", 0)), np.float32)
        limit = min(self._batch, batch_size or self._batch)
        order = sorted(range(len(unique)), key=lambda row: len(unique[row]))
        found: list[Any] = [None] * len(unique)
        with tqdm(total=len(unique), disable=not show_progress, unit="text", leave=False) as bar:
            start = 0
            while start < len(order):
                stop, characters = start + 1, len(unique[order[start]])
                while stop < len(order) and stop - start < limit:
                    characters += len(unique[order[stop]])
                    if characters > _BATCH_CHARACTERS:
                        break
                    stop += 1
                rows = order[start:stop]
                for row, vector in zip(rows, self._vectors([unique[row] for row in rows], role), strict=True):
                    found[row] = vector
                bar.update(len(rows))
                start = stop
        vectors = np.asarray(found, np.float32)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or not norms.all():
            raise RemoteModelError(f"{self.name} returned a vector that is zero or not finite. Check the service.")
        rows_of: Vectors = (vectors / norms)[places]
        return rows_of

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return an estimate of each text's token count, since the tokenizer is at the service."""
        return [max(len(text.split()), math.ceil(len(text) / _CHARACTERS_PER_TOKEN)) for text in texts]

    def identity(self) -> dict[str, Any]:
        """Return the model's name, prompts and width, and which number is largest in each probe's vector.

        Vectors of one model differ a little from machine to machine, which a hash of them would not survive. The place
        of the largest number does survive it, and three of them are the same by chance in one of dimension^3 models.
        """
        return {
            "kind": self.remote.kind,
            "model": self.remote.model or self._served,
            "dimension": self.dimension,
            "prompts": [self.query_prompt, self.document_prompt],
            "roles": self._roles,
            "probe": [int(place) for place in np.abs(self._probe).argmax(axis=1)],
        }

    def describe(self) -> list[Fact]:
        """Return address, prompts, roles, dimensions and lengths, each with its source."""
        return [
            Fact("run by", f"{self.remote.kind} at {self.remote.url}", "name"),
            Fact("model", self.remote.model or self._served, "name" if self.remote.model else "the service"),
            Fact("query prompt", repr(self.query_prompt), self._prompts_source),
            Fact("document prompt", repr(self.document_prompt), self._prompts_source),
            Fact("roles", self._roles, "name" if "roles" in self.remote.options else f"usual for {self.remote.kind}"),
            Fact("dimensions", str(self.dimension), "a probe"),
            Fact(
                "longest text",
                f"{self.max_document_tokens} tokens",
                "the service or the name" if self._limit_is_known else "guessed; say max_tokens=N in the name",
            ),
            Fact(
                "key", next((each for each in _KEYS[self.remote.kind] if os.environ.get(each)), "none"), "environment"
            ),
        ]

    @property
    def device(self) -> str:
        """Address of the service."""
        return self.remote.url

    @property
    def reader_folder(self) -> Path | None:
        """Folder of the reader that the name asks for."""
        folder = self.remote.options.get("reader")
        return None if folder is None else Path(folder).resolve()

    @property
    def source(self) -> str:
        """The name, with an absolute path of the reader: an index opens it from any directory."""
        if self.reader_folder is None:
            return self._given
        options = {**self.remote.options, "reader": str(self.reader_folder)}
        return f"{self._given.partition('?')[0]}?{urlencode(options, safe='/:', quote_via=quote)}"

    def _ask_limits(self) -> tuple[str, int, int]:
        """Return the served model's name, its longest text in tokens and the most texts in a request."""
        if self.remote.kind != "tei":
            return self.remote.model, _DEFAULT_MAX_TOKENS, _BATCHES[self.remote.kind]
        info = self._request("GET", "/info", None)
        if not isinstance(info, dict):
            raise RemoteModelError(f"{self.remote.url}/info returned no object. Check the address.")
        return (
            str(info.get("model_id", "tei")),
            int(info.get("max_input_length") or _DEFAULT_MAX_TOKENS),
            min(256, int(info.get("max_client_batch_size") or _BATCHES["tei"])),
        )

    def _vectors(self, texts: list[str], role: Role) -> list[Any]:
        """Return a vector for each text of one request."""
        remote = self.remote
        kind, options = remote.kind, remote.options
        model = remote.model
        if self._roles == "suffix":
            model = f"{model}-{'query' if role == 'query' else 'passage'}"
        body: dict[str, Any]
        if kind == "tei":
            path, body = "/embed", {"inputs": texts, "truncate": True, "normalize": True}
        elif kind == "ollama":
            path, body = "/api/embed", {"model": model, "input": texts, "truncate": True}
        elif kind == "cohere":
            path = "/v2/embed"
            body = {"model": model, "texts": texts, "embedding_types": ["float"], "truncate": "END"}
            body["input_type"] = "search_query" if role == "query" else "search_document"
        else:
            path, body = "/embeddings", {"model": model, "input": texts, "encoding_format": "float"}
            if self._roles == "input_type":
                body["input_type"] = "query" if role == "query" else "passage"
        if "dimensions" in options:
            body["output_dimension" if kind == "cohere" else "dimensions"] = int(options["dimensions"])
        data = self._request("POST", path, body)
        try:
            if kind == "tei":
                vectors = data
            elif kind == "ollama":
                vectors = data["embeddings"]
            elif kind == "cohere":
                vectors = data["embeddings"]["float"]
            else:
                items = sorted(data["data"], key=lambda item: int(item["index"]))
                vectors = [_decoded(item["embedding"]) for item in items]
            widths = {len(vector) for vector in vectors}
        except (KeyError, TypeError, ValueError) as error:
            raise RemoteModelError(
                f"{remote.url}{path} returned no vectors ({type(error).__name__}). Check the kind of service."
            ) from error
        if len(vectors) != len(texts) or len(widths) != 1 or widths != {getattr(self, "dimension", *widths)}:
            raise RemoteModelError(
                f"{remote.url}{path} returned {len(vectors)} vectors of width {sorted(widths)} for {len(texts)} texts. "
                "Check the service."
            )
        return list(vectors)

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        """Send a request; transient failures are tried again after a pause that grows, or that the service asks for."""
        url = self.remote.url + path
        for attempt in range(1, _TRIES + 1):
            pause = min(_LONGEST_PAUSE, 0.5 * 2 ** (attempt - 1)) * (0.5 + random.random() / 2)
            try:
                answer = self._client.request(method, url, json=body)
            except httpx.HTTPError as error:
                # Nobody listens: a service that restarts is back within two tries.
                if attempt == _TRIES or (isinstance(error, httpx.ConnectError) and attempt > 2):
                    raise RemoteModelError(
                        f"{self.remote.url} does not answer ({reason_of(error)}). Start it or check the address."
                    ) from error
                time.sleep(pause)
                continue
            if answer.status_code < 300:
                try:
                    return answer.json()
                except ValueError as error:
                    raise RemoteModelError(f"{url} returned no JSON. Check the address.") from error
            if answer.status_code not in _TRANSIENT or attempt == _TRIES:
                raise self._refused(url, answer)
            wait = _retry_after(answer.headers)
            if wait is not None and wait > _LONGEST_PAUSE:
                raise RemoteModelError(f"{url} allows the next request in {wait:.0f} s. Run again then.")
            time.sleep(pause if wait is None else wait + random.random() * 0.1)
        raise AssertionError("every last attempt returns or raises")

    def _refused(self, url: str, answer: httpx.Response) -> RemoteModelError:
        status = answer.status_code
        if status in (401, 403):
            return RemoteModelError(f"{url} refused the key ({status}). Set {_KEYS[self.remote.kind][0]}.")
        if status == 404:
            return RemoteModelError(
                f"{url} is not there, or has no model {self.remote.model or 'to serve'} (404). Check name and address."
            )
        text = " ".join(answer.text.split())[:_SHOWN]
        return RemoteModelError(f"{url} refused ({status}: {text}). Check model, lengths and options.")


def _decoded(value: object) -> Any:
    """Return a vector; services may send base64 of little-endian float32 although floats are requested."""
    return np.frombuffer(base64.b64decode(value), "<f4") if isinstance(value, str) else value


def _retry_after(headers: httpx.Headers) -> float | None:
    """Return the seconds that a service asks to wait."""
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
