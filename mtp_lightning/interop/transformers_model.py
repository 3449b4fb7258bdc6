"""A folder loaded by transformers, to compare this project with.

transformers skips MTP layers when it loads a trunk, by a class attribute that lists their tensors.
For DeepSeek-V3 it lists only layer 61, for Llama none, so other models need :func:`one_line` before
they are loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.errors import UserError, require_package
from mtp_lightning.interop.config_json import ARCHITECTURES, STANDS_FOR


def patterns(n_layers: int, depth: int) -> list[str]:
    """Regular expressions that match the MTP layers' tensors."""
    return [rf"model\.layers\.{layer}\." for layer in range(n_layers, n_layers + depth)]


def one_line(model_type: str, n_layers: int, depth: int) -> str:
    """The line of Python that a transformers user needs before ``from_pretrained``."""
    listed = ", ".join(f'r"{pattern}"' for pattern in patterns(n_layers, depth))
    name = ARCHITECTURES[model_type]
    return f"transformers.{name}._keys_to_ignore_on_load_unexpected = [{listed}]"


class Loaded:
    """A folder loaded by transformers, in float32: the trunk with its head, and the ``depth`` MTP
    layers that transformers has. ``model_type`` and ``n_layers`` are those of its config.json.

    Raises:
        UserError: if transformers is missing, or refuses the folder.
    """

    def __init__(self, folder: Path, *, model_type: str, n_layers: int, depth: int) -> None:
        transformers = import_transformers()
        from transformers.modeling_layers import MtpModel

        kind = getattr(transformers, ARCHITECTURES[STANDS_FOR.get(model_type, model_type)])
        self.depth = depth
        # MiMo's layers have names that no class of transformers knows.
        mimo = model_type in STANDS_FOR
        names = [r"model\.mtp_layers\."] if mimo else patterns(n_layers, depth)
        # A new subclass leaves the attribute of the process-wide class unchanged; see one_line.
        ignored = {"_keys_to_ignore_on_load_unexpected": names}
        with quiet(transformers):
            try:
                patched: Any = type(kind.__name__, (kind,), ignored)
                self.model, info = patched.from_pretrained(
                    folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
                )
                self.mtp = MtpModel.from_pretrained(self.model).eval() if depth else None
            except Exception as error:  # the folder's files may have any values
                raise UserError(f"transformers cannot load {folder}: {briefly(error)}.") from error
            # Tensors that the trunk needs and the folder lacks, and those that are not read.
            self.missing = sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])])
            self.unexpected = sorted(info["unexpected_keys"])
        self.model.eval()

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Iterator[Tensor]:
        """Teacher-forced logits of depths 0 .. D, each [B, T, V].

        Args:
            tokens: windows [B, at least T + D].
        """
        seq_len = tokens.shape[1] - self.depth
        hidden = self.model.get_decoder()(tokens[:, :seq_len]).last_hidden_state
        yield self.model.lm_head(hidden)
        positions = torch.arange(seq_len).unsqueeze(0)
        for k in range(1, self.depth + 1):
            assert self.mtp is not None
            hidden = self.mtp.forward_layer(
                k - 1, hidden, positions + k, None, input_ids=tokens[:, k : k + seq_len]
            )
            yield self.model.lm_head(hidden)

    @torch.inference_mode()
    def greedy(self, prompt: Tensor, n_new: int, *, use_mtp: bool) -> tuple[list[int], int]:
        """The greedy continuation of ``prompt`` [T], and the trunk's passes for it."""
        passes = 0

        def count(*_: Any) -> None:
            nonlocal passes
            passes += 1

        hook = self.model.get_decoder().register_forward_hook(count)
        transformers = import_transformers()
        # The folder's own may end texts or penalize repetitions.
        self.model.generation_config = transformers.GenerationConfig()
        try:
            with quiet(transformers):
                out = self.model.generate(
                    prompt.unsqueeze(0),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                    max_new_tokens=n_new,
                    do_sample=False,
                    use_mtp=use_mtp,
                )
        finally:
            hook.remove()
        return out[0, len(prompt) :].tolist(), passes


def briefly(error: Exception) -> str:
    """The beginning of an error's message, on one line."""
    return " ".join(str(error).split())[:300].rstrip(".")


def import_transformers() -> Any:
    """The package.

    Raises:
        UserError: if it is missing.
    """
    what = "The check of a folder (verify=false leaves it out)"
    require_package("transformers", what=what, extra="hf")
    import transformers

    return transformers


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Silence the package: this project compares the same facts and reports them itself."""
    settings = transformers.utils.logging
    level, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity(logging.CRITICAL)
    settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.set_verbosity(level)
        if bars:
            settings.enable_progress_bar()
