"""Settings of memory: what is computed twice, moved, split or shortened to hold less at a time."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from lisatune.settings.methods import FIRST_ORDER, NOT_FORGOTTEN
from lisatune.settings.optim import IN_BLOCKS
from lisatune.settings.row import row
from lisatune.settings.task import SFT

ONE_MEMORY = "where host and device are one memory"
NOTHING_FROZEN = {"method=full": "where no layer is frozen"}
IN_SHARDS = (  # the rows of a slice that a process holds are not what a checkpoint takes for its shard
    "sampled_unit!=slices or dp_shard_size=1 or interval_steps=1 and num_active<num_slices and sampler!=fixed and "
    "state_policy!=keep and optim.in_blocks"
)
FACTORED_IN_SHARDS = "optim!=factored or dp_shard_size=1 or sampled_unit=slices and train_embedding!=true and train_head!=true and train_norms!=true"
NOT_KEPT = {"state_policy=keep": "which moves optimizer state before the layers: choose another state_policy"}


class Memory(BaseModel):
    """Memory and processes."""

    dp_shard_size: int = row(
        1,
        "Number of processes that share one copy of the weights. 1 gives each its own copy (data parallel). All of them split one "
        "copy (FSDP). A number between makes several split copies (hybrid).",
        ge=1, free=True, ladder=1, pulled=None,
        needs={
            IN_SHARDS: "cannot be more than 1 with slices that hold optimizer state: leave it out, or set interval_steps=1 "
            "and optim=adamw",
            FACTORED_IN_SHARDS: "cannot be more than 1 with optim=factored, unless all that trains is cut into slices: leave it out",
        }, tasks=SFT,
    )  # fmt: skip
    reduce_dtype: Literal["float32", "auto"] = row(
        "float32",
        "Number type in which processes sum gradients. auto is the gradient's own: with bfloat16, half is sent.",
        free=True, needs={
            "dtype!=float32": "has no effect with dtype=float32, whose gradients are float32: leave it out",
        }, tasks=SFT,
    )  # fmt: skip
    dtype: Literal["auto", "float32", "bfloat16"] = row(
        "auto",
        "Number type of the weights. auto is bfloat16 on a GPU and float32 on a CPU. bfloat16 updates are rounded "
        "stochastically.",
    )
    gradient_checkpointing: bool | Annotated[int, Field(ge=1)] = row(
        False,
        "Compute activations twice and hold fewer of them: those of all decoder layers, or of so many from the lowest up.",
        methods=FIRST_ORDER, ladder=5,
    )  # fmt: skip
    activation_offloading: bool = row(
        False, "Keep the inputs of checkpointed layers in host memory.",
        methods=FIRST_ORDER, gpu=ONE_MEMORY, ladder=8,
        needs={
            "gradient_checkpointing": "moves the inputs of checkpointed layers: set gradient_checkpointing=true, or leave it out"
        }, tasks=SFT,
    )  # fmt: skip
    vocabulary_blocks: bool = row(
        False, "Make and use the gradients of embedding and head a block of rows at a time, never whole.",
        methods=FIRST_ORDER, whole=True, ladder=4,
        idle_with={"method=lora": "which trains neither embedding nor head"},
        needs=IN_BLOCKS | {
            "train_embedding or train_head": "has no effect while embedding and head are frozen: leave it out",
            "sampled_unit!=slices or train_embedding=true or train_head=true": "has no effect with sampled_unit=slices, which "
            "makes the gradients of a few rows alone: leave it out",
        }, tasks=SFT,
    )  # fmt: skip
    optimizer_in_backward: bool = row(
        False, "Update each weight as soon as its gradient exists. Needs max_grad_norm=0.",
        methods=FIRST_ORDER, whole=True, ladder=2,
        needs=IN_BLOCKS | {
            "max_grad_norm=0": "cannot clip by the global norm, which is known only when all weights are updated: set "
            "max_grad_norm=0, or leave it out",
            "gradient_accumulation_steps=1": "cannot add up micro-batches, whose gradients are gone: set "
            "gradient_accumulation_steps=1, or leave it out",
        }, tasks=SFT,
    )  # fmt: skip
    offload_optimizer: bool = row(
        False, "Keep optimizer state in host memory, and bring it to the device a block at a time.",
        methods=FIRST_ORDER, gpu=ONE_MEMORY, whole=True, ladder=7, needs=IN_BLOCKS | {
            NOT_FORGOTTEN: "has no effect with slices that train for one step, because they hold no optimizer state: leave it out",
            "optim.has_moments": "has no effect with an optimizer that has no moments of each weight: leave it out",
        }, tasks=SFT,
    )  # fmt: skip
    frozen_bits: Literal[4, 8] | None = row(
        None,
        "Compute frozen decoder layers from copies in 8 bits (int8) or 4 bits (NF4). The exact weights are in host memory, train "
        "exactly and are saved. With method=lora this is QLoRA.",
        methods=FIRST_ORDER, whole=True, idle_with=NOTHING_FROZEN, never_with=NOT_KEPT,
        needs={
            "gradient_checkpointing=true": "needs gradient_checkpointing=true, or the backward pass would keep every layer in "
            "full on the device",
        }, tasks=SFT,
    )  # fmt: skip
    offload_frozen: bool = row(
        False, "Keep frozen decoder layers in host memory, and bring them to the device one at a time.",
        methods=FIRST_ORDER, gpu=ONE_MEMORY, whole=True, ladder=9,
        idle_with=NOTHING_FROZEN, never_with=NOT_KEPT,
        needs={
            "gradient_checkpointing=true": "needs gradient_checkpointing=true, or the backward pass would keep every layer on "
            "the device",
        }, tasks=SFT,
    )  # fmt: skip
