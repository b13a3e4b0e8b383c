"""The model of a run or a server: where its files are on every rank, and what it can answer."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from mpillm.batch.work import Model
from mpillm.comm.world import World
from mpillm.model.embedding import embedding_settings
from mpillm.run import catalogue
from mpillm.run.progress import Progress
from mpillm.run.session import Session
from mpillm.spec import Spec
from mpillm.store.readable import printable
from mpillm.text import load_tokenizer


def model_path(world: World, spec: Spec, progress: Progress) -> Path:
    """Where the model is: rank 0 fetches it if need be, then every rank looks for it on its own node (collective)."""
    for ranks in (range(1), range(1, world.size)):
        with world.together():
            if world.rank in ranks:
                path = catalogue.resolve(spec.model, progress.downloading)
    return path


def model_name(path: Path) -> str:
    """How answers name the model."""
    return printable(path.stem if path.suffix == ".gguf" else path.resolve().name)


def model_of(session: Session, path: Path, now: Callable[[], datetime] | None = None) -> Model:
    """The model with its tokenizer; `now` is the time that chat templates are given."""
    config = session.config
    tokenizer = load_tokenizer(session.source.tokenizer, config.vocab, now or datetime.now)
    return Model(
        vocab=config.vocab,
        max_position=config.max_position,
        hidden=config.hidden,
        end_ids=frozenset(config.eos_ids) | (tokenizer.end_ids if tokenizer else frozenset()),
        kv_tokens=session.origin.kv_tokens,
        kv_token_bytes=session.kv_token_nbytes,
        text=tokenizer,
        embedding=embedding_settings(session.source),
        name=model_name(path),
    )
