"""The Python side of Ulysses Plus: what only Hugging Face's libraries do well.

    python -m ulysses_plus.prepare   chats -> a token file, cached
    python -m ulysses_plus.fetch     a model or tokenizer from the hub -> a folder
    python -m ulysses_plus.demo      a small model, trained on two processes, recalls a fact across them

Importing this package imports nothing heavy; each module loads what it needs when it needs it.
"""
