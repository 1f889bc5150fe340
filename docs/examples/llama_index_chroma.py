"""Index documents with LlamaIndex and Chroma, and search with and without demonstrations.

    python docs/examples/llama_index_chroma.py
    python docs/examples/llama_index_chroma.py ~/notes --index-dir notes.chroma --question "renew passport"
    python docs/examples/llama_index_chroma.py ~/notes --demonstrations pairs.jsonl --question "renew it"

Without a folder it indexes a few pages of the manual of a coffee machine. `pairs.jsonl` has one
{"query": ..., "passage": ...} per line. Changed demonstrations need no new embeddings.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

import chromadb
from chromadb.api import ClientAPI
from llama_index.core import Document, SimpleDirectoryReader, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import BaseNode, NodeWithScore
from llama_index.vector_stores.chroma import ChromaVectorStore

from epic_rag import DemonstrationBank, EpicError
from llama_index.embeddings.epic import EpicEmbedding

MANUAL = {
    "descaling": "Descale every three months. Fill the tank with water and one sachet of descaler, hold the "
    "steam button for five seconds and let the programme run to its end.",
    "error-e7": "Error E7 means that the pump draws air. Check that the tank is pushed in all the way, then "
    "open the hot water tap until water flows without spluttering.",
    "error-e9": "Error E9 means that the grinder is blocked. Switch off at the mains, empty the bean "
    "container and remove what is stuck with the brush.",
    "milk": "For milk foam use cold milk. Hold the nozzle just below the surface, and clean it with a moist "
    "cloth straight after use.",
    "grind": "Turn the knob one step to the left for a finer grind, but only while the grinder is running.",
    "warranty": "The warranty runs for two years from the day of purchase. Keep the receipt. It does not "
    "cover damage by limescale.",
    "changes": "Version 2 of the firmware fixes a wrong E7 message, a crash during descaling and the "
    "spelling of several menus.",
}
QUESTIONS = ["it says E7 again, what now", "coffee runs through too fast", "white crust in the tank"]
# These queries want the page that helps, not the list of changes.
DEMONSTRATIONS = [
    ("E3 flashing", "Error E3 means that the tray is full. Pull it out, empty it and wait for ten seconds."),
    ("tastes of nothing", "If coffee tastes thin, use more beans: press the bean button until three beans show."),
]


def read_documents(folder: str | None) -> list[Document]:
    """Return the pages of the manual, or the text files in a folder; ids are the same in every run."""
    if folder is None:
        return [Document(text=text, id_=name) for name, text in MANUAL.items()]
    reader = SimpleDirectoryReader(folder, recursive=True, required_exts=[".md", ".rst", ".txt"], filename_as_id=True)
    return reader.load_data()


def open_collection(client: ClientAPI, name: str, embedding: EpicEmbedding) -> chromadb.Collection:
    """Open or create a cosine collection with the fingerprint of the encoder that fills it.

    `get_or_create_collection` ignores the configuration of a collection that exists. Chroma's default is squared
    Euclidean distance, and its default `ef_search` misses neighbours.
    """
    if name in {collection.name for collection in client.list_collections()}:
        collection = client.get_collection(name, embedding_function=None)
        embedding.check_documents((collection.metadata or {}).get("fingerprint"))
        return collection
    return client.create_collection(
        name,
        embedding_function=None,  # LlamaIndex passes vectors
        configuration={"hnsw": {"space": "cosine", "ef_search": 200}},
        metadata={"fingerprint": embedding.document_fingerprint},
    )


def ingest(documents: Sequence[Document], embedding: EpicEmbedding) -> Sequence[BaseNode]:
    """Return chunks with vectors. `for_documents()` keeps demonstrations out of the pipeline's cache keys."""
    splitter = SentenceSplitter(chunk_size=200, chunk_overlap=20)
    return IngestionPipeline(transformations=[splitter, embedding.for_documents()]).run(documents=list(documents))


def replace(client: ClientAPI, collection: chromadb.Collection, nodes: Sequence[BaseNode]) -> None:
    """Store new chunks, then delete the old ones of the same documents.

    In this order a crash leaves a document twice, and the next run repairs it. `docstore_strategy=UPSERTS` deletes
    first: a crash while it embeds loses the document.
    """
    documents = sorted({node.ref_doc_id or "" for node in nodes})
    stale = set(collection.get(where={"document_id": {"$in": documents}}, include=[])["ids"])
    store = ChromaVectorStore(chroma_collection=collection)
    limit = client.get_max_batch_size()
    for start in range(0, len(nodes), limit):
        store.add(list(nodes[start : start + limit]))
    stale -= {node.node_id for node in nodes}
    if stale:
        collection.delete(ids=sorted(stale))


def search(collection: chromadb.Collection, embedding: EpicEmbedding, query: str, top_k: int) -> list[NodeWithScore]:
    """Return the best chunks, with their cosine as the score."""
    store = ChromaVectorStore(chroma_collection=collection)
    index = VectorStoreIndex.from_vector_store(store, embed_model=embedding)
    hits = index.as_retriever(similarity_top_k=top_k).retrieve(query)
    for hit in hits:
        # ChromaVectorStore returns exp(-distance), and a cosine collection's distance is 1 - cosine.
        hit.score = 1 + math.log(hit.get_score())
    return hits


def show(title: str, hits: Sequence[NodeWithScore]) -> None:
    """Print one hit per line."""
    print(f"  {title}")
    for hit in hits:
        snippet = " ".join(hit.node.get_content().split())[:60]
        print(f"    {hit.get_score():.3f}  {hit.node.ref_doc_id}  {snippet}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Index, then search every question twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="folder of .md, .rst and .txt files")
    parser.add_argument("--question", action="append", help="may be given several times")
    parser.add_argument("--demonstrations", metavar="FILE", help="JSON lines of query and passage")
    parser.add_argument("--model", help="checkpoint name or folder; the shipped one by default")
    parser.add_argument("--index-dir", help="keep the collection in this folder; in memory by default")
    parser.add_argument("--top-k", type=int, default=3)
    options = parser.parse_args(arguments)

    settings = chromadb.Settings(anonymized_telemetry=False)
    if options.index_dir:
        client = chromadb.PersistentClient(options.index_dir, settings=settings)
    else:
        client = chromadb.EphemeralClient(settings=settings)
    try:
        embedding = EpicEmbedding(model=options.model, task="docs")
        bank = DemonstrationBank(DEMONSTRATIONS, task="docs")
        if options.demonstrations:
            bank = DemonstrationBank.from_jsonl(options.demonstrations, task="docs")
        collection = open_collection(client, "documents", embedding)
        replace(client, collection, ingest(read_documents(options.folder), embedding))
    except EpicError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{collection.count()} chunks")
    for question in options.question or QUESTIONS:
        print(question)
        show("without demonstrations", search(collection, embedding, question, options.top_k))
        adapted = embedding.with_bank(bank)
        show(f"with {len(bank)} demonstrations", search(collection, adapted, question, options.top_k))
    return 0


if __name__ == "__main__":
    sys.exit(main())
