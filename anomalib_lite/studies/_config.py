"""A YAML file and a Python file -> a study: its configuration, checked, and its functions."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from anomalib_lite._validation import closest
from anomalib_lite.errors import AnomalibLiteError, InvalidValueError, MissingPathError
from anomalib_lite.studies._extra import missing_extra

try:
    import yaml
    from pydantic import (
        AfterValidator,
        BaseModel,
        ConfigDict,
        Field,
        ValidationError,
        ValidationInfo,
        model_validator,
    )
except ImportError as error:
    raise missing_extra(error.name or "pydantic") from error

__all__ = ["BesideConfig", "NetworkConfig", "Study", "StudyConfig", "StudyModel", "open_study"]


def _beside(path: Path, info: ValidationInfo) -> Path:
    """Take a relative path from the directory of the YAML file."""
    folder = (info.context or {}).get("folder")
    return path if folder is None else (Path(folder) / path).resolve()


# Changes of a configuration for a quick run.
_QUICK = {"max_train": 16, "max_test": 8, "seeds": [0]}
BesideConfig = Annotated[Path, AfterValidator(_beside)]


class StudyModel(BaseModel):
    """A part of a configuration: as pydantic's models, but an unknown key names the closest.

    Examples
    --------
    >>> class Bank(StudyModel):
    ...     ratio: float = 0.05
    >>> Bank(ratio=0.1).ratio
    0.1
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _name_the_closest(cls, given: Any) -> Any:
        for key in given if isinstance(given, dict) else ():
            if key not in cls.model_fields:
                known = ", ".join(cls.model_fields)
                hint = closest(key, cls.model_fields)
                raise ValueError(f"unknown key {key!r}.{hint} Known keys: {known}")
        return given


class NetworkConfig(StudyModel):
    """A backbone of a study; see :class:`~anomalib_lite.PatchCore` for what each key means.

    Attributes
    ----------
    backbone : str
        Short name or timm's name.
    weights : Path or None
        File of the weights, relative to the YAML file. By default installed, in
        ``ANOMALIB_LITE_WEIGHTS``, or from the hub.
    layers : list of str or int, or None
    image_size : int or (H, W), default=256
    """

    backbone: str
    weights: BesideConfig | None = None
    layers: list[str | int] | None = None
    image_size: int | tuple[int, int] = 256

    def parameters(self) -> dict[str, Any]:
        """Return these as parameters of a detector.

        >>> NetworkConfig(backbone="resnet18").parameters()["image_size"]
        256
        """
        return {name: getattr(self, name) for name in type(self).model_fields}


class StudyConfig(StudyModel):
    """What every study can be told. Subclass it as ``Config`` and add the study's own keys.

    Attributes
    ----------
    categories : list of str
        Such as ``"mvtec_ad/bottle"``, ``"visa/*"`` or ``"textile"``; see :func:`category_names`.
    seeds : list of int, default=[0, 1, 2]
    max_train, max_test : int or None, default=None
        Most images of a category to fit on and to test, the latter half normal; None for all.
    missing : {"skip", "refuse"}, default="skip"
        Whether categories and networks that are not on this machine are left out, with the reason
        in the log and the summary, or are an error before anything runs.
    data_root : Path or None, default=None
        Directory that holds the data sets, relative to the YAML file. The option ``--data-root``
        and the variable ``ANOMALIB_LITE_DATA`` come first.
    n_jobs : int or None, default=None
        As for every detector.

    Examples
    --------
    >>> class Config(StudyConfig):
    ...     coreset_ratio: float = 0.05
    >>> Config(categories=["textile"]).seeds
    [0, 1, 2]
    """

    categories: list[str] = Field(default_factory=list)
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2], min_length=1)
    max_train: int | None = Field(default=None, ge=1)
    max_test: int | None = Field(default=None, ge=2)
    missing: Literal["skip", "refuse"] = "skip"
    data_root: BesideConfig | None = None
    n_jobs: int | None = None


@dataclass(frozen=True)
class Study:
    """A study that is ready to run.

    Attributes
    ----------
    name : str
        Name of its results folder.
    file, source : Path
        The YAML file and the Python file.
    module : module
        The Python file, loaded: ``Config``, ``measure`` and what else it has.
    config : StudyConfig
        Its configuration, an instance of the module's ``Config``.
    identity : dict of str to str
        Hashes of the configuration (without seeds and the place of the data) and of the Python
        file with those beside it that it imports, and those that its ``SOURCES`` lists: rows of
        others are never mixed with its own.
    """

    name: str
    file: Path
    source: Path
    module: Any
    config: StudyConfig
    identity: dict[str, str]


def open_study(
    file: str | os.PathLike[str], *, seeds: Sequence[int] | None = None, quick: bool = False
) -> Study:
    """Read a configuration and load the study that it names; nothing is measured.

    Parameters
    ----------
    file : path
        YAML file with ``study:``, a Python file relative to it; ``name:``; and the keys of the
        study's ``Config``.
    seeds : sequence of int, optional
        Instead of those of the file.
    quick : bool, default=False
        At most 16 images to fit on and 8 to test, one seed, and what the study's ``QUICK`` says, a
        dict of keys of its ``Config``: to see that it works.

    Returns
    -------
    Study

    Raises
    ------
    MissingPathError
        If a file does not exist.
    InvalidValueError
        If the YAML cannot be read, a key is unknown or missing, a value is wrong, or the Python
        file has no ``Config`` or ``measure``.

    Examples
    --------
    >>> import tempfile
    >>> code = '''
    ... from anomalib_lite.studies import StudyConfig
    ...
    ... class Config(StudyConfig):
    ...     sides: int = 6
    ...
    ... def measure(config, run):
    ...     for case in run.cases({"seed": seed} for seed in run.seeds):
    ...         yield {"thrown": config.sides}
    ... '''
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "study.py").write_text(code)
    ...     _ = Path(folder, "dice.yaml").write_text("{study: study.py, name: dice, sides: 8}")
    ...     study = open_study(Path(folder, "dice.yaml"))
    >>> study.name, study.config.sides
    ('dice', 8)
    """
    file = Path(file)
    given = _read_yaml(file)
    for key in ("study", "name"):
        if not isinstance(given.get(key), str) or not given[key]:
            raise InvalidValueError(
                f"{file}: {key} must be a text, got {given.get(key)!r}. A study needs study: (its "
                "Python file) and name:."
            )
    source, name = (file.parent / given.pop("study")).resolve(), given.pop("name")
    if Path(name).name != name:
        raise InvalidValueError(f"{file}: name must be the name of a folder, got {name!r}.")
    module = _load(source, file)
    if quick:
        given |= {**_QUICK, **getattr(module, "QUICK", {})}
    of_config = {key: value for key, value in given.items() if key not in ("seeds", "data_root")}
    if seeds is not None:
        given["seeds"] = list(seeds)
    try:
        config = module.Config.model_validate(given, context={"folder": file.parent})
    except ValidationError as error:
        raise InvalidValueError(_one_line(file, error)) from error
    identity = {
        "configuration": _sha256(json.dumps(of_config, sort_keys=True, default=str).encode()),
        "study": _sha256(b"\0".join(path.read_bytes() for path in _files(module))),
    }
    return Study(name, file, source, module, config, identity)


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise MissingPathError(f"studies: {file} does not exist. Name the YAML file of a study.")
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise InvalidValueError(f"{file}: not a YAML file: {text}.") from error
    if not isinstance(given, dict):
        raise InvalidValueError(f"{file}: must hold keys and values, got {given!r}.")
    return given


def _load(source: Path, file: Path) -> Any:
    """Load the Python file of a study under a name of its own, as a package of its folder.

    So it can import what lies beside it (``from .splits import draw_splits``), and two studies may
    have files of the same name.
    """
    if not source.is_file():
        raise MissingPathError(f"{file}: study must be a Python file, got {source}, which is none.")
    name = f"anomalib_lite_study_{_sha256(str(source).encode())[:12]}"
    for known in [n for n in sys.modules if n.startswith(f"{name}.")]:
        del sys.modules[known]  # the file may have changed
    folder = [str(source.parent)]
    spec = importlib.util.spec_from_file_location(name, source, submodule_search_locations=folder)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic looks up annotations there
    try:
        spec.loader.exec_module(module)
    except AnomalibLiteError:
        raise
    except Exception as error:
        raise InvalidValueError(
            f"{source}: cannot be loaded: {type(error).__name__}: {error}."
        ) from error
    config, measure = getattr(module, "Config", None), getattr(module, "measure", None)
    if not (isinstance(config, type) and issubclass(config, StudyConfig)):
        raise InvalidValueError(f"{source}: must have a class Config(StudyConfig), got {config!r}.")
    if not inspect.isgeneratorfunction(measure):
        raise InvalidValueError(
            f"{source}: must have a function measure(config, run) that yields rows, got "
            f"{measure!r}."
        )
    return module


def _files(module: Any) -> list[Path]:
    """Return the Python file of a study, those beside it that it has imported, and its SOURCES."""
    beside = sorted(n for n in sys.modules if n.startswith(f"{module.__name__}."))
    files = [Path(str(m.__file__)) for m in (module, *(sys.modules[name] for name in beside))]
    return [*files, *map(Path, getattr(module, "SOURCES", ()))]


def _one_line(file: Path, error: ValidationError) -> str:
    """Return the first thing that is wrong, and where."""
    first, *more = error.errors()
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] in ("value_error", "missing") else f", got {first['input']!r}"
    also = f" ({len(more)} more of the kind follow.)" if more else ""
    return f"{file}: {place + ': ' if place else ''}{message}{got}.{also}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
