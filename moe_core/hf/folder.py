"""A run as a folder that plain ``transformers`` loads, and such a folder as the beginning of a run.

    run.export_hf("models/first")
    AutoModelForCausalLM.from_pretrained("models/first")       # no remote code; logits within 1e-5 in float32

The folder has the model in one of three forms (``moe_core.hf.forms``), its tokenizer, a card made from the run, and
``moe_workbench.safetensors``: the few tensors that do not come back to the bit from what ``transformers`` keeps (a
router whose temperature was taken into its weight, a norm as 1 + w), so that a run that begins with the folder has
exactly the weights that were exported. They are believed only where they give the folder's own weights to the bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moe_core import finetune
from moe_core.checked import first_line
from moe_core.checkpoint import readable_as
from moe_core.config import ConfigError, RunConfig
from moe_core.data import DataError, tokenizer_of
from moe_core.data.pretrained import load_pretrained, quiet_transformers, save_folder
from moe_core.export import ExportError
from moe_core.hf import card, forms
from moe_core.knobs import Knobs
from moe_core.origin import Origin
from moe_core.probe import Weights, weights_of

OWN = "moe_workbench.safetensors"
SHARD = "5GB"  # a file's size at most, as far as single tensors allow


# ---- there ---------------------------------------------------------------------------------------------------

def export(run, folder: str | os.PathLike, step: int | str | None = None) -> Path:
    """See ``Run.export_hf``, which is this; ``run`` may also be a :class:`~moe_core.probe.Saved`."""
    folder, config = Path(folder), run.config
    if os.path.lexists(folder):
        raise ExportError(f"{folder}: exists already; choose another folder")
    form = forms.form_of(config)
    weights = weights_of(run, step)
    state = {name: value.detach().cpu() for name, value in weights.model.items()
             if not name.startswith("mtp.")}  # the heads for tokens further on are of use in training alone
    forms.refuse_weights(state)
    tokenizer, temp = tokenizer_of(config, print), weights.knobs["router_temp"]
    end = None if tokenizer is None else tokenizer.end_of_text
    theirs = forms.to_hf(state, config.model, form, temp)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        draft.mkdir(parents=True)
        _save_model(draft, theirs, config, form, end)
        _save_own(draft / OWN, state, theirs, config, form, weights)
        if tokenizer is not None:
            save_folder(tokenizer, draft, model_max_length=config.model.block_size)
        (draft / "README.md").write_text(card.card(run, weights, form, tokenizer is not None), encoding="utf-8")
        for file in draft.glob("*.safetensors"):
            readable_as(file, draft)
        draft.rename(folder)
    except OSError as error:
        raise ExportError(f"{folder}: not written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _save_model(folder: Path, theirs: dict[str, Tensor], config: RunConfig, form: str, end: int | None) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    with quiet_transformers():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(forms.hf_config(config, form, end))
        model.load_state_dict(theirs, assign=True)
        model.tie_weights()
        model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
        model.save_pretrained(folder, max_shard_size=SHARD)


def _save_own(path: Path, state: dict[str, Tensor], theirs: dict[str, Tensor], config: RunConfig, form: str,
              weights: Weights) -> None:
    from safetensors.torch import save_file

    back = forms.from_hf(theirs, config.model, form)
    own = {name: value.contiguous() for name, value in state.items()
           if name not in back or not torch.equal(back[name], value)}
    about = {"router_temp": weights.knobs["router_temp"], "step": weights.step, "config": config.to_dict()}
    save_file(own, path, metadata={"about": json.dumps(about)})


# ---- and back ------------------------------------------------------------------------------------------------

def fields(folder: str | os.PathLike) -> dict:
    """Fields of the config that a folder of ``transformers`` sets: ``config.replace(**hf.fields(folder))``.

    Raises ConfigError where it is no model of a kind that a run can be.
    """
    from transformers import AutoConfig

    with _loading(folder), quiet_transformers():
        theirs = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        found = forms.fields_of(theirs)
        about = _about(Path(folder))
        if about is not None:  # the same, said as the run said it
            said = RunConfig.from_dict(about["config"]).flat()
            found |= {name: said[name] for name in ("n_kv_heads", "qk_norm_eps", "router_bias", "n_shared_experts")}
            return found
    return found | {"router_bias": False, "router_temp_init": 1.0, "router_temp_final": 1.0}


def begin_with(config: RunConfig, folder: str | os.PathLike, say: Callable[[str], None]) -> tuple[RunConfig, Origin]:
    """For ``Run.create(..., init_from_hf=folder)``. Raises ConfigError, DataError."""
    folder = Path(folder)
    theirs = RunConfig().replace(**fields(folder))
    name = str(folder)
    there, here = finetune.comparable(theirs.model), finetune.comparable(config.model)
    there["router_bias"] = here["router_bias"]
    finetune.refuse_other(there, here, name, None, config)
    for field, (now, wanted) in finetune.computes_otherwise(theirs, config).items():
        raise ConfigError(f"{field} = {now!r}: must be {wanted!r}, as in {name}")
    try:
        tokenizer = load_pretrained(str(folder.resolve())) if (folder / "tokenizer.json").exists() else None
    except DataError as error:
        raise DataError(f"init_from_hf: {error}") from error
    config = finetune.with_tokenizer(config, tokenizer, theirs.model.vocab_size, None, name, say)
    with _loading(folder):
        state, temp = _weights(folder, theirs, say)
    first = Knobs(config)["router_temp"].at(1)
    if first != temp:
        say(f"router_temp = {first:g}: at {temp:g} the router computes what it did in {name}")
    source = finetune.Source(name, theirs, state, None, {"path": str(folder.resolve()), "step": None})
    return config, Origin(finetune.fitted(config, source, say), None, source.parent | {"how": "init_from_hf"})


def _weights(folder: Path, theirs: RunConfig, say: Callable[[str], None]) -> tuple[dict[str, Tensor], float]:
    """Our state, and the router's temperature that goes with it."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False,
                                                     local_files_only=True, use_safetensors=True)
    form, stored = model.config.model_type, model.state_dict()
    state, about = forms.from_hf(stored, theirs.model, form), _about(folder)
    if about is None:
        return state, 1.0
    from safetensors.torch import load_file

    exact, temp = state | load_file(folder / OWN), about["router_temp"]
    again = forms.to_hf(exact, theirs.model, form, temp)
    if all(torch.equal(again[name], value) for name, value in stored.items() if name in again):
        return exact, temp
    say(f"{folder}: its weights were changed after it was exported, so they are taken as they are")
    return state, 1.0


def _about(folder: Path) -> dict | None:
    """What an export said of itself; None where the folder is none."""
    from safetensors import safe_open

    if not (folder / OWN).is_file():
        return None
    with safe_open(folder / OWN, framework="pt") as file:
        return json.loads(file.metadata()["about"])


@contextlib.contextmanager
def _loading(folder: str | os.PathLike):
    """One line for what ``transformers`` and safetensors say of a folder that they cannot read."""
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"init_from_hf = {str(folder)!r}: must be a folder with a config.json and safetensors")
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # they have no common class
        raise ConfigError(f"init_from_hf = {str(folder)!r}: cannot be loaded ({first_line(error)})") from error
