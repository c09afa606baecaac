"""What a job needs measured, where the results are cached, and doing it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from launcher.job import Job
from launcher.job.schema import ModelSection
from launcher.plan.facts import DataFacts, ModelFacts
from launcher.plan.resolve import check_model
from launcher.prepare import sources
from launcher.run_dir import write_atomic

Progress = Callable[..., None]
_MODEL_VERSION = 3
_DATA_VERSION = 4


class ModelRequest(BaseModel):
    """A model and the folder for what is measured of it."""

    model_config = ConfigDict(protected_namespaces=())

    model: ModelSection
    cache: Path


class Request(BaseModel):
    """A job and the folder for what is measured and tokenised."""

    job: Job
    cache: Path

    @property
    def model(self) -> ModelSection:
        return self.job.model


class Prepared(BaseModel):
    """The model and the data of a job, measured."""

    model_config = ConfigDict(protected_namespaces=())

    model: ModelFacts
    data: DataFacts


def cached(request: Request) -> Prepared | None:
    """What was prepared before, found without importing anything heavy; None where something has changed or is new."""
    model = cached_model(request)
    if model is None:
        return None
    data = cached_data(request, Path(model.folder))
    return Prepared(model=model, data=data) if data else None


def carry_out(request: Request, progress: Progress) -> Prepared:
    """Fetches, converts, measures and tokenises what is not cached yet. Raises RequestError."""
    model = measured(request, progress)
    check_model(request.job, model)
    data = cached_data(request, Path(model.folder)) or _tokenise(request, Path(model.folder), progress)
    return Prepared(model=model, data=data)


def measured(request: Request | ModelRequest, progress: Progress) -> ModelFacts:
    """The model's facts, from the cache or measured now. Raises RequestError."""
    return cached_model(request) or _measure_model(request, progress)


def cached_model(request: Request | ModelRequest) -> ModelFacts | None:
    """Facts of a model measured before whose files are still as they were."""
    try:
        facts = ModelFacts.model_validate_json(_model_facts_file(request).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return facts if Path(facts.folder).is_dir() else None


def cached_data(request: Request, model_folder: Path) -> DataFacts | None:
    """Facts of data tokenised before from the same files, tokenizer and settings."""
    from launcher.prepare.tokenise import read_data_facts

    return read_data_facts(_data_folder(request, model_folder))


def _measure_model(request: Request | ModelRequest, progress: Progress) -> ModelFacts:
    from launcher.prepare import model_facts

    section = request.model
    folder = sources.find_model_folder(section.name_or_path, section.gguf_file)
    if folder is None:
        progress(message=f"fetching {section.name_or_path}")
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
    parts = [_MODEL_VERSION, stamp, section.gguf_file, _method(section), isinstance(request, Request)]
    return request.cache / "models" / f"{sources.fingerprint(parts)}.json"


def _method(section: ModelSection) -> dict[str, object]:
    """What of the job decides which parameters are trained, and what is looked at with the model."""
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
