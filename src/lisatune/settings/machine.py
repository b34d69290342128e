"""Settings of the machine, of chance, and of what is logged."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, field_validator

from lisatune.errors import UserError, did_you_mean
from lisatune.settings.methods import FIRST_ORDER
from lisatune.settings.row import row
from lisatune.settings.task import SFT

# trackers, as transformers and accelerate name them, to the packages that they need
PACKAGES = {
    "tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow", "comet_ml": "comet_ml",
    "swanlab": "swanlab", "aim": "aim", "clearml": "clearml", "dvclive": "dvclive",
}  # fmt: skip


def trackers_of(report_to: str | list[str]) -> list[str]:
    """The trackers that are asked for, each once.

    Example:
        >>> trackers_of("none"), trackers_of("wandb,mlflow"), trackers_of(["wandb"])
        ([], ['wandb', 'mlflow'], ['wandb'])
    """
    words = report_to.split(",") if isinstance(report_to, str) else report_to
    return [word for word in dict.fromkeys(word.strip() for word in words) if word != "none"]


class Machine(BaseModel):
    """Device, seed and logging."""

    device: str = row("auto", "cpu, cuda, cuda:1, mps, ... auto takes a GPU if there is one.", one_value=True)
    attn_implementation: Literal[
        "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4"
    ] = row(
        "auto",
        "What computes attention, by transformers' name. auto is transformers' choice, and needs no mask for packed rows. flash_attention needs a GPU and a package.",
        free=True,
        needs={
            "packing=false or attn_implementation=auto or attn_implementation=eager or attn_implementation=sdpa":
            "does not keep the documents of several packed rows apart: leave it out, or leave packing out",
        },
    )  # fmt: skip
    full_determinism: bool = row(
        False, "Equal runs give equal bits on a CPU of any maker, and on a GPU, with slower kernels."
    )
    torch_compile: bool = row(
        False,
        "Compile each decoder layer with torch.compile, for the steps. It needs a C++ compiler, or Triton on a GPU. No switch "
        "of layers compiles again. Weights agree to rounding.",
        methods=FIRST_ORDER, whole=True, tasks=SFT,
        needs={
            "sampled_unit!=slices and sampled_unit!=modules": "needs decoder layers, or their halves, that train or not as a whole: "
            "set recipe=paper, or leave it out",
        },
        never_with={
            "full_determinism": "which promises bits that no compiler does", "offload_frozen": "which moves weights",
            "frozen_bits": "which computes them from codes", "frozen_learning_rate": "which looks inside of a layer",
        },
    )  # fmt: skip
    trust_remote_code: bool = row(False, "Run the code that the model's folder contains.", free=True, one_value=True)
    seed: int = row(0, "Seed of the sampled layers, the order of the data, and the dropout.", ge=0)
    report_to: str | list[str] = row(
        "none", f"Trackers that get the metrics too: one or several of {', '.join(PACKAGES)}.", free=True, was="log_to"
    )
    project: str = row(
        "lisatune", "Project of the trackers.", min_length=1, free=True,
        only_with={"report_to!=none": "has no effect without a tracker: set report_to"},
    )  # fmt: skip
    run_name: str | None = row(
        None, "Name of the run for the trackers. Default: the name of the output folder.", min_length=1, free=True,
        only_with={"report_to!=none": "has no effect without a tracker: set report_to"},
    )  # fmt: skip
    norm_steps: int | None = row(
        None,
        "Write each layer's norms to norms.jsonl every so many steps, for lisatune norms.",
        ge=1,
        whole=True,
        tasks=SFT,
    )
    profile_steps: int | None = row(
        None, "Profile so many steps after the first 3: where a step's time goes, and a trace, in profile/.", ge=1,
        free=True, tasks=SFT,
    )  # fmt: skip
    logging_steps: int = row(1, "Write a line to metrics.jsonl every so many steps.", ge=1, one_value=True)

    @field_validator("report_to")
    @classmethod
    def _known_trackers(cls, report_to: str | list[str]) -> str | list[str]:
        for name in trackers_of(report_to):
            if name not in PACKAGES:
                hint = did_you_mean(name, PACKAGES) or f": choose of {', '.join(PACKAGES)}"
                raise UserError(f"report_to={name}: there is no such tracker{hint}")
        return report_to
