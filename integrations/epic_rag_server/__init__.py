"""HTTP server for epic-rag: embeddings for OpenAI's, TEI's and Cohere's clients, search, banks of demonstrations.

Needs the extra `serve`. `epic-rag serve` is the command; `create_app` returns the ASGI application for other servers.
"""

from __future__ import annotations

from epic_rag.errors import needs_extra

with needs_extra("serve", "the server"):
    from epic_rag_server.app import Server, create_app
    from epic_rag_server.banks import BankStore
    from epic_rag_server.local_queries import LocalQueries
    from epic_rag_server.security import AccessPolicy
    from epic_rag_server.service import Service

__all__ = ["AccessPolicy", "BankStore", "LocalQueries", "Server", "Service", "create_app"]
