"""LoRA (Hu et al. 2021) on PEFT: low-rank adapters beside frozen weights.

The transformer's weights are frozen in the compute dtype: a 7B model takes 14 GB in bfloat16 instead of 28, without
gradients and optimizer moments. The adapters and the projector are trained in float32.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from epic_rag.backbone import Backbone
from epic_rag.errors import ConfigError, MissingExtraError
from epic_rag.files import save_tensors
from epic_rag.training.config import TrainingConfig

__all__ = ["Adapter"]


_ALL = "all-linear"


class Adapter:
    """LoRA on a backbone: adapter layers in its transformer, whose other weights are frozen.

    Args:
        backbone: The model; its projector becomes float32.
        config: Rank, alpha, dropout, targets; the seed decides the adapters' first values.

    Raises:
        ConfigError: If `lora_targets` names no module of the model.
        MissingExtraError: If PEFT is not installed.
    """

    def __init__(self, backbone: Backbone, config: TrainingConfig) -> None:
        require_peft()
        if backbone.has_query_weights:
            raise ConfigError(
                "lora_rank is set, and the model has weights of its own for queries. Name its base model."
            )
        from peft import LoraConfig, PeftModel

        targets: Any = _ALL if _ALL in config.lora_targets else list(config.lora_targets)
        settings = LoraConfig(
            r=config.lora_rank or 1,
            lora_alpha=cast("int", config.lora_alpha),  # PEFT only multiplies by it
            lora_dropout=config.lora_dropout,
            target_modules=targets,
            task_type="FEATURE_EXTRACTION",
        )
        self.backbone = backbone
        self._num_layers = config.num_layers
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(config.seed)
            # PEFT uses a deprecated name of transformers.
            warnings.simplefilter("ignore", FutureWarning)
            try:
                self._wrapped = PeftModel(backbone.transformer, settings)
            except ValueError as error:
                names = sorted(
                    {
                        name.rpartition(".")[2]
                        for name, module in backbone.transformer.named_modules()
                        if isinstance(module, torch.nn.Linear)
                    }
                )
                raise ConfigError(
                    f"lora_targets is {list(config.lora_targets)}, and the model's linear modules are "
                    f"{', '.join(names)}. Name some of them, or all-linear."
                ) from error
        backbone.projector.float()
        if backbone.head is not None:
            backbone.head.float()

    def merged(self) -> Backbone:
        """Return a plain backbone with the adapters merged in: a copy on the CPU, in float32.

        A 16-bit weight would round away an update that is small beside it.
        """
        device = self.backbone.device
        # Copied on the CPU: a GPU may not hold the model twice.
        self.backbone.to("cpu")
        plain: PreTrainedModel = cast("Any", copy.deepcopy(self._wrapped).float()).merge_and_unload()
        projector = copy.deepcopy(self.backbone.projector).float()
        head = copy.deepcopy(self.backbone.head)
        self.backbone.to(device)
        result = Backbone(plain, pooling=self.backbone.pooling, projector=projector.kind)
        result.set_head(head)
        result.projector.load_state_dict(projector.state_dict())
        return result.eval()

    def save(self, folder: Path, base: str) -> None:
        """Write a PEFT folder, for `EpicEncoder.from_pretrained(base, adapter=folder)`.

        Args:
            folder: Made if it is missing.
            base: Name of the base model in it.
        """
        from peft import get_peft_model_state_dict

        folder.mkdir(parents=True, exist_ok=True)
        settings: Any = copy.deepcopy(self._wrapped.peft_config["default"])
        settings.base_model_name_or_path = base
        settings.inference_mode = True
        if self._num_layers is not None:
            # The base has more layers than the truncated model.
            settings.layers_to_transform = list(range(self._num_layers))
        tensors = get_peft_model_state_dict(self._wrapped, save_embedding_layers=False)
        save_tensors(
            {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
            folder / "adapter_model.safetensors",
        )
        settings.save_pretrained(str(folder))


def require_peft() -> None:
    """Raise unless PEFT is installed.

    Raises:
        MissingExtraError: If it is not.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError("peft", "train", "training with LoRA")
