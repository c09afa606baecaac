"""Measures the model and data of a job, or reads the cached results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from launcher.job import Job
from launcher.job.schema import ModelSection
from launcher.plan.facts import DataFacts, ModelFacts
from launcher.plan.resolve import check_model
from launcher.prepare import sources
from launcher.prepare.cache import keep_below
from launcher.run_dir import write_atomic

Progress = Callable[..., None]
_MODEL_VERSION = 6
_DATA_VERSION = 6


class ModelRequest(BaseModel):
    """A model and the cache folder for its measurements."""

    model_config = ConfigDict(protected_namespaces=())

    model: ModelSection
    cache: Path


class Request(BaseModel):
    """A job and the cache folder for measurements and tokenised data."""

    job: Job
    cache: Path

    @property
    def model(self) -> ModelSection:
        return self.job.model


class Prepared(BaseModel):
    """The measurements of a job's model and data."""

    model_config = ConfigDict(protected_namespaces=())

    model: ModelFacts
    data: DataFacts


def cached(request: Request) -> Prepared | None:
    """The cached result, found without heavy imports; None if the model or data changed or are new."""
    model = cached_model(request)
    if model is None:
        return None
    data = cached_data(request, Path(model.folder))
    return Prepared(model=model, data=data) if data else None


def run_request(request: Request, progress: Progress) -> Prepared:
    """Downloads, converts, measures and tokenises what is not cached yet. Raises RequestError."""
    model = measured(request, progress)
    check_model(request.job, model)
    data = cached_data(request, Path(model.folder)) or _tokenise(request, Path(model.folder), progress)
    _keep_below_limit(request, Path(data.train.folder).parent, progress)
    return Prepared(model=model, data=data)


def _keep_below_limit(request: Request, newest: Path, progress: Progress) -> None:
    """Removes entries of the cache until it takes at most the job's data.cache_limit_gb, if that is set."""
    limit = request.job.data.cache_limit_gb
    if limit is None:
        return
    removed, size = keep_below(request.cache, limit * 1e9, newest)
    if removed:
        freed = sum(entry.bytes for entry in removed) / 1e9
        progress(message=f"removed unused cache entries: {len(removed)}, {freed:.1f} GB (data.cache_limit_gb)")
    if size > limit * 1e9:
        progress(message=f"the cache takes {size / 1e9:.1f} GB, more than data.cache_limit_gb: the rest is in use")


def measured(request: Request | ModelRequest, progress: Progress) -> ModelFacts:
    """The model's facts, from the cache or measured now. Raises RequestError."""
    return cached_model(request) or _measure_model(request, progress)


def cached_model(request: Request | ModelRequest) -> ModelFacts | None:
    """The cached facts of a model whose files are unchanged, or None."""
    try:
        facts = ModelFacts.model_validate_json(_model_facts_file(request).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return facts if Path(facts.folder).is_dir() else None


def cached_data(request: Request, model_folder: Path) -> DataFacts | None:
    """The cached facts of data tokenised from the same files with the same tokenizer and settings, or None."""
    from launcher.prepare.tokenise import read_data_facts

    return read_data_facts(_data_folder(request, model_folder))


def _measure_model(request: Request | ModelRequest, progress: Progress) -> ModelFacts:
    from launcher.prepare import model_facts

    section = request.model
    folder = sources.find_model_folder(section.name_or_path, section.gguf_file)
    if folder is None:
        progress(message=f"downloading {section.name_or_path}")
        folder = model_facts.download(section.name_or_path, section.revision)
    if section.gguf_file:
        target = (
            request.cache / "models" / f"gguf-{sources.fingerprint(sources.file_stamps([folder / section.gguf_file]))}"
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_dir():
            model_facts.convert_gguf(folder, section.gguf_file, target, progress)
        folder = target
    progress(message="measuring the model")
    facts = model_facts.measure_model(folder.resolve(), section, trained_here=isinstance(request, Request))
    file = _model_facts_file(request)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, facts.model_dump_json(indent=2))
    return facts


def _tokenise(request: Request, model_folder: Path, progress: Progress) -> DataFacts:
    from launcher.prepare.tokenise import TextRequest, tokenise

    section, target = request.job.data, _data_folder(request, model_folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    train, held_out = sources.find_split_data(section)
    text = TextRequest(
        train=train,
        eval=held_out,
        format=section.format,
        max_length=section.max_length,
        split=section.split,
        eval_split=section.eval_split,
        seed=request.job.train.seed,
        chat_template=section.chat_template,
        chat_template_kwargs=section.chat_template_kwargs,
        learn=section.learn,
    )
    return tokenise(text, model_folder, target, request.job.model.trust_remote_code, progress)


def _model_facts_file(request: Request | ModelRequest) -> Path:
    section = request.model
    folder = sources.find_model_folder(section.name_or_path, section.gguf_file)
    stamp = sources.model_stamp(folder) if folder else f"{section.name_or_path}@{section.revision}"
    parts = [_MODEL_VERSION, stamp, section.gguf_file, _training_settings(section), isinstance(request, Request)]
    return request.cache / "models" / f"{sources.fingerprint(parts)}.json"


def _training_settings(section: ModelSection) -> dict[str, object]:
    """The settings that decide which parameters are trained and what is checked in the model."""
    lora = {"r", "target_modules", "merge"}
    return section.model_dump(mode="json", include={"lora": lora, "freeze": True, "liger": True})


def _data_folder(request: Request, model_folder: Path) -> Path:
    from launcher.prepare.chat_template import read_template

    section = request.job.data
    train, held_out = sources.find_split_data(section)
    parts = [
        _DATA_VERSION,
        sources.tokenizer_fingerprint(model_folder),
        _stamp(train),
        _stamp(held_out),
        request.job.train.seed if isinstance(section.eval, float) else None,
        section.format,
        section.max_length,
        section.split,
        section.eval_split,
        read_template(section.chat_template)[0] if section.chat_template else None,
        section.chat_template_kwargs,
        section.learn,
    ]
    return request.cache / "data" / sources.fingerprint(parts)


def _stamp(source: sources.DataSource | float | None) -> object:
    if not isinstance(source, sources.DataSource):
        return source
    if source.saved is not None:
        return sources.file_stamps(path for path in source.saved.rglob("*") if path.is_file())
    return [source.hub_name, source.config] if source.hub_name else sources.file_stamps(source.files)
