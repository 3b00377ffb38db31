"""A model's configuration for `tq plan`: found by path or Hugging Face name, and read by whoever knows it best.

Where vLLM is installed, by the steps of its ModelConfig that read a configuration: its config classes, and its own count of layers
and heads, which must be ours. (The rest of ModelConfig imports the model's code, in a process of its own: 15 seconds, and it fails
for want of packages that planning does not need.) Else, where transformers is installed, by AutoConfig. By hand only without both,
and for the few models whose class is in neither.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tq_backend import model_layers
from tq_backend.class_defaults import CLASS_DEFAULTS
from tq_backend.model_text import FilledIn, check_generates, check_numbers, language_part, shown, text_config

MOST_BYTES = 16 << 20  # a config.json has a few KB; some with quantization maps have 2 MB


def hub_file(name: str) -> Path | None:
    """The newest config.json of a model in the local cache of huggingface_hub, if there is one."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub"
    folder = Path(cache).expanduser() / f"models--{name.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text().strip()
    except OSError:
        return None
    found = folder / "snapshots" / revision / "config.json"
    return found if found.is_file() else None


def config_file(name: str, flag: str = "--config") -> Path:
    """A config.json, the one in a folder, or the one of a Hugging Face name. Raises ValueError if there is none."""
    path = Path(name)
    try:
        file = path / "config.json" if path.is_dir() else path
        if file.is_file():
            return file
        there = file.exists()
    except (OSError, ValueError) as error:  # a name too long for a file, or with a NUL
        raise ValueError(f"{flag} {shown(name)} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if there:
        raise ValueError(f"{flag} {shown(name)} cannot be read: it is no file")
    if (
        not path.is_absolute()
        and len(path.parts) <= 2
        and ".." not in path.parts
        and (found := hub_file(name)) is not None
    ):
        return found
    raise ValueError(
        f"{flag} {shown(name)} cannot be read: there is no such file, no folder with a config.json, and no such model in the "
        "local Hugging Face cache; `hf download NAME` puts it there"
    )


def read_file(name: str | Path) -> dict[str, Any]:
    """The JSON object of a config.json. Raises ValueError with a sentence."""
    file = config_file(str(name))

    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}, which is no JSON number")

    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        config = json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
    except RecursionError:
        raise ValueError(f"--config {file} cannot be read as a config.json: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {file} cannot be read as a config.json: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--config {file} is not a config.json: it holds no object")
    return config


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the libraries log: warnings about running a model, and errors that they raise too. And without the network. Their
    variables are put back, as this process may start an engine later."""
    before = logging.root.manager.disable
    defaults = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    added = [name for name in defaults if name not in os.environ]
    logging.disable(logging.ERROR)
    os.environ.update({name: defaults[name] for name in added})
    try:
        yield
    finally:
        logging.disable(before)
        for name in added:
            os.environ.pop(name, None)


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # ValueError: a stand-in in sys.modules
        return False


@contextmanager
def model_folder(config: Mapping[str, Any]) -> Iterator[str]:
    """A folder as both libraries read one: without the model's own code, and without a quantization of weights, which not every
    machine may run and which does not change the cache."""
    with tempfile.TemporaryDirectory(prefix="tq-plan-") as folder:
        left = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
        (Path(folder) / "config.json").write_text(json.dumps(left))
        yield folder


def filled_in(config: Any) -> FilledIn:
    """What a config class holds for its language model."""
    whole = config.to_dict()
    check_generates(whole)
    text = config.get_text_config()
    found = FilledIn(text.to_dict() if text is not config else whole)
    found["dtype"] = str(found.get("dtype") or whole.get("dtype") or "bfloat16")
    found["model_type"] = text.model_type
    return found


class NoClass(Exception):
    """A library knows no class of this model."""


@contextmanager
def speaking_for(package: str) -> Iterator[None]:
    """Turns what a library raises about a configuration, which may be anything, into NoClass or a ValueError with a sentence."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        words = " ".join(str(error).split())
        if "does not recognize this architecture" in words:
            raise NoClass from error
        raise ValueError(
            f"{package} does not take this configuration: {type(error).__name__}: {words[:300]}"
        ) from error


def by_transformers(config: Mapping[str, Any]) -> FilledIn:
    with quiet(), model_folder(config) as folder, speaking_for("transformers"):
        from transformers import AutoConfig

        return filled_in(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))


def by_vllm(config: Mapping[str, Any]) -> FilledIn:
    with quiet(), model_folder(config) as folder, speaking_for("vLLM"):
        import vllm.config  # noqa: F401  # before the two below, which import each other through it
        from vllm.transformers_utils.config import get_config, get_hf_text_config
        from vllm.transformers_utils.model_arch_config_convertor import (
            MODEL_ARCH_CONFIG_CONVERTORS,
            ModelArchConfigConvertorBase,
        )

        whole = get_config(folder, trust_remote_code=False)
        found = filled_in(whole)
        convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(whole.model_type, ModelArchConfigConvertorBase)
        engine = convertor(whole, get_hf_text_config(whole)).convert()
    check_against_engine(text_config(found), engine)
    return found


def check_against_engine(text: Mapping[str, Any], engine: Any) -> None:
    """Raises ValueError where vLLM counts otherwise: one of the two is wrong, and so may be the plan."""
    counts = [("layers", text["num_hidden_layers"], engine.total_num_hidden_layers)]
    if engine.per_layer_overrides is None and text.get("block_configs") is None:
        counts.append(("KV heads", text["num_key_value_heads"], engine.total_num_kv_heads))
        counts.append(("elements in a head", text["head_dim"], engine.head_size))
    for what, ours, theirs in counts:
        if ours != theirs:
            raise ValueError(
                f"vLLM reads {theirs} {what} from this configuration and tq-backend {ours}; so there is no plan: please report the model"
            )


READERS = {"vllm": by_vllm, "transformers": by_transformers}


def read_config(name: str | Path) -> Mapping[str, Any]:
    """What model_layers takes. Raises ValueError with a sentence."""
    config = read_file(name)
    check_numbers(config)
    kind = language_part(config).get("model_type")
    by_hand = isinstance(kind, str) and kind in CLASS_DEFAULTS
    if by_hand:
        model_layers.cache_layers(config)  # a mistake is said at once, before the libraries are imported
    for package, read in READERS.items():
        if not installed(package):
            continue
        try:
            return read(config)
        except NoClass:
            continue
        except ImportError as error:
            print(f"tq plan: {package} is installed and cannot be imported ({error})", file=sys.stderr)
    return config
