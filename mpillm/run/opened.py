"""Finds the model of a run or a server on every rank, and opens it with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from mpillm.batch.work import Model
from mpillm.catalogue import models
from mpillm.comm.world import World
from mpillm.errors import ModelError
from mpillm.model.config import ModelConfig
from mpillm.model.embedding import EmbeddingSettings, answer_words, embedding_settings
from mpillm.model.pooled import Classifier, answers_classifier, read_classifier
from mpillm.run.progress import Progress
from mpillm.run.session import Session
from mpillm.spec import Spec
from mpillm.store.readable import printable
from mpillm.text import Tokenizer
from mpillm.weights.source import Source


def model_path(world: World, spec: Spec, progress: Progress) -> Path:
    """Return the model's path on rank 0, which fetches it if needed (collective)."""
    return world.on_rank_0(lambda: models.resolve(spec.model_on(world.host), progress.downloading))


def found_here(world: World, spec: Spec, progress: Progress) -> Callable[[Path], Path]:
    """Return a function that finds the model on this rank's host, given its path on rank 0; see `Session`."""

    def find(path: Path) -> Path:
        return models.resolve(spec.model_on(world.host), progress.downloading) if world.rank else path

    return find


def model_name(path: Path) -> str:
    """Return the name of the model in answers; in the cache of huggingface_hub that of the repository."""
    if path.suffix in (".gguf", ".m"):
        return printable(path.stem)
    folder = path.resolve()
    repository = folder.parent.parent.name
    cached = folder.parent.name == "snapshots" and repository.startswith("models--")
    return printable(repository.rpartition("--")[2] if cached else folder.name)


def model_of(session: Session, path: Path, now: Callable[[], datetime] | None = None) -> Model:
    """Open the model with its tokenizer; `now` gives the time for chat templates."""
    config, source, scoring = session.config, session.source, session.spec.scoring
    tokenizer = session.tokenizer
    if tokenizer is not None and now is not None:
        tokenizer.tell_time(now)
    embedding = embedding_settings(source)
    classifier = _classifier(source, config, tokenizer, scoring.tokens, embedding)
    template = tokenizer.template("rerank") if tokenizer else None
    answers = config.classifier is None and classifier is not None
    if template is None and answers and not (tokenizer and tokenizer.chat_reads("'document'")):
        template = config.pair_template
    longest = config.max_position
    if not config.generates and embedding.max_tokens is not None:
        longest = min(longest, embedding.max_tokens)
    return Model(
        vocab=config.vocab,
        max_position=longest,
        hidden=config.hidden,
        end_ids=frozenset(config.eos_ids) | (tokenizer.end_ids if tokenizer else frozenset()),
        kv_tokens=session.origin.kv_tokens,
        kv_token_bytes=session.kv_token_nbytes,
        text=tokenizer,
        embedding=embedding,
        generates=config.generates,
        classifier=classifier,
        pair_template=template,
        name=model_name(path),
        adapters=session.adapters.names,
    )


def _classifier(
    source: Source,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    words: list[str],
    said: EmbeddingSettings,
) -> Classifier | None:
    """Return the model's classifier, or one made of rows of its LM head for the job's words or those in its files."""
    if config.classifier is not None:
        return read_classifier(source, config.classifier)
    words = answer_words(source, config.pair_template, words, said.answers is not None)
    if not config.generates or not (words or said.answers):
        return None
    if said.answers and not words:
        no, yes = said.answers
    else:
        if len(words) not in (1, 2):
            raise ModelError(
                f"scoring.tokens are {words}, but must be the token for relevant, or the tokens for not "
                "relevant and relevant."
            )
        *others, yes = (_token(word, tokenizer) for word in words)
        no = others[0] if others else None
    if max(yes, no or 0) >= config.vocab or min(yes, no or 0) < 0:
        raise ModelError(
            f"{source.path} names the tokens {no} and {yes} as answers; its vocabulary has {config.vocab}."
        )
    return answers_classifier(source, no, yes)


def _token(word: str, tokenizer: Tokenizer | None) -> int:
    if tokenizer is None:
        raise ModelError(f"scoring.tokens has {word!r}, and the model has no tokenizer.")
    ids = tokenizer.encode(word, add_special=False, parse_special=True)
    if len(ids) != 1:
        raise ModelError(
            f"scoring.tokens has {word[:60]!r}, which is {len(ids)} tokens of the model and must be one."
        )
    return ids[0]
