"""The tools that ``peers.py`` sets side by side: what pip installs for each, and how each is asked for the same run.

All that can be held equal is: float32, constant learning rate, no weight decay, gradients clipped at 1, torch's AdamW, no
gradient checkpointing, no evaluation, no checkpoint before the end, rows in their order, answers learned alone, the
chat template of SmolLM2. LoRA has rank 16 and alpha 32 on all linear layers. LISA has two layers for five steps, with
embedding, head and norm in training.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RATE, ROWS, TOKENS, RANK, ALPHA, LAYERS, INTERVAL = 1e-4, 4, 256, 16, 32, 2, 5
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # as its template has it
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Job:
    """One run of one tool.

    Args:
        bin: Folder of the tool's commands.
        folder: An empty folder for what it writes.
        model: The model's folder.
        rows: Chats, one a line, as ``{"messages": [...]}``.
        method: ``lisa``, ``lora``, ``full``; for lisatune ``slices`` too.
        steps: Optimizer steps.
    """

    bin: Path
    folder: Path
    model: Path
    rows: Path
    method: str
    steps: int

    def write(self, name: str, content: Any) -> Path:
        """``content`` as JSON, which is YAML too, or as text, in a file of the folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1), encoding="utf-8")
        return path


@dataclass(frozen=True)
class Tool:
    """A tool.

    Args:
        methods: What it is compared in.
        command: The command of a job, after it has written its files.
        requires: What pip installs; the first is the tool itself. None: it runs with this Python.
        alone: Whether pip leaves out what the first requires, which ``requires`` then names.
        loss: What stands before the loss, in what it prints or logs once a step.
        log: The file in the job's folder that has these lines; what it prints, by default.
        note: What one has to know about its numbers.
    """

    methods: tuple[str, ...]
    command: Callable[[Job], list[str]]
    requires: tuple[str, ...] | None
    alone: bool = False
    loss: str = r"'loss': '?"
    log: str = "output.txt"
    note: str = ""


def words(options: Mapping[str, Any]) -> list[str]:
    """Options as the command line of transformers takes them."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


# of transformers' Trainer, on which four of the tools are built
TRAINER = {
    "per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 1, "learning_rate": RATE, "lr_scheduler_type": "constant",
    "weight_decay": 0.0, "max_grad_norm": 1.0, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": 0,
    "optim": "adamw_torch_fused",
}  # fmt: skip


def lisatune(job: Job) -> list[str]:
    """Its default is a slice of every matrix; ``lisa`` is the paper's."""
    own = {
        "lisa": ["recipe=paper", f"num_active={LAYERS}", f"interval_steps={INTERVAL}"],
        "lora": ["method=lora", f"lora_r={RANK}", f"lora_alpha={ALPHA}", "save_merged=false"],
        "full": ["method=full"],
        "slices": [],
    }[job.method]
    return [
        sys.executable, "-m", "lisatune", "train", "--model", str(job.model), "--data", str(job.rows), "--output", str(job.folder / "run"),
        f"max_steps={job.steps}", f"per_device_train_batch_size={ROWS}", f"max_length={TOKENS}", f"learning_rate={RATE}",
        "lr_scheduler_type=constant", "shuffle=false", "dtype=float32", "device=cpu", *own,
    ]  # fmt: skip


def trl(job: Job) -> list[str]:
    """Its own command, which takes rows as prompt and completion."""
    chats = [json.loads(line)["messages"] for line in job.rows.read_text(encoding="utf-8").splitlines()]
    pairs = [json.dumps({"prompt": chat[:1], "completion": chat[1:]}) + "\n" for chat in chats]
    job.write("rows/train.jsonl", "".join(pairs))
    options = TRAINER | {
        "model_name_or_path": job.model, "dataset_name": job.folder / "rows", "output_dir": job.folder / "out", "max_steps": job.steps,
        "max_length": TOKENS, "bf16": "false", "dtype": "float32", "use_cpu": "true", "gradient_checkpointing": "false",
        "train_sampling_strategy": "sequential", "eos_token": "<|im_end|>",
    }  # fmt: skip
    if job.method == "lora":
        options |= {"use_peft": "true", "lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}  # fmt: skip
    return [str(job.bin / "trl"), "sft", *words(options)]


def ms_swift(job: Job) -> list[str]:
    """It knows SmolLM2 by no name, so it is given the type, the template and the system prompt."""
    options = TRAINER | {
        "model": job.model, "model_type": "llama", "template": "chatml", "system": SYSTEM, "check_model": "false",
        "dataset": job.rows, "split_dataset_ratio": 0, "dataset_shuffle": "false", "train_dataloader_shuffle": "false",
        "dataloader_num_workers": 0, "max_length": TOKENS, "truncation_strategy": "right", "torch_dtype": "float32",
        "gradient_checkpointing": "false", "warmup_ratio": 0, "max_steps": job.steps, "output_dir": job.folder / "out",
        "tuner_type": "lora" if job.method == "lora" else "full",
    }  # fmt: skip
    if job.method == "lora":
        options |= {"lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": "all-linear"}
    if job.method == "lisa":
        options |= {"lisa_activated_layers": LAYERS, "lisa_step_interval": INTERVAL}
    return [str(job.bin / "swift"), "sft", *words(options)]


def soup(job: Job) -> list[str]:
    """It has no limit on steps and shuffles, so the rows are an epoch."""
    training: dict[str, Any] = {
        "epochs": 1, "lr": RATE, "batch_size": ROWS, "gradient_accumulation_steps": 1, "warmup_ratio": 0.0, "weight_decay": 0.0,
        "max_grad_norm": 1.0, "scheduler": "constant", "optimizer": "adamw_torch_fused", "quantization": "none", "logging_steps": 1,
        "gradient_checkpointing": False, "save_steps": 100_000, "seed": 0,
    }  # fmt: skip
    training["lora"] = {
        "r": RANK if job.method == "lora" else 0,
        "alpha": ALPHA,
        "dropout": 0.0,
        "target_modules": "all-linear",
    }
    if job.method == "lisa":
        training |= {"lisa_enabled": True, "lisa_num_layers": LAYERS, "lisa_interval_steps": INTERVAL}
        del training["lora"]
    config = {
        "base": str(job.model), "task": "sft", "output": str(job.folder / "out"), "training": training,
        "data": {"train": str(job.rows), "format": "chatml", "val_split": 0.0, "max_length": TOKENS},
    }  # fmt: skip
    return [str(job.bin / "soup"), "train", "--yes", "-c", str(job.write("soup.yaml", config))]


def llamafactory(job: Job) -> list[str]:
    """It has SmolLM2's template. It imports torchaudio, which an empty module stands for."""
    job.write("torchaudio/__init__.py", "")
    job.write("data/dataset_info.json", {"rows": {
        "file_name": str(job.rows), "formatting": "sharegpt", "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }})  # fmt: skip
    config = TRAINER | {
        "stage": "sft", "do_train": True, "model_name_or_path": str(job.model), "template": "smollm2", "dataset": "rows",
        "dataset_dir": str(job.folder / "data"), "cutoff_len": TOKENS, "disable_shuffling": True, "output_dir": str(job.folder / "out"),
        "max_steps": job.steps, "bf16": False, "fp16": False, "use_cpu": True, "disable_gradient_checkpointing": True,
        "dataloader_num_workers": 0, "finetuning_type": job.method, "overwrite_cache": True, "plot_loss": False,
    }  # fmt: skip
    if job.method == "lora":
        config |= {"lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "lora_target": "all"}
    return [str(job.bin / "llamafactory-cli"), "train", str(job.write("llamafactory.yaml", config))]


TORCHTUNE_ROWS = '''
import json
from transformers import AutoTokenizer

def rows(tokenizer, source, model, longest):
    """torchtune has neither SmolLM2's tokenizer nor its chat template: these rows are encoded by transformers."""
    encode = AutoTokenizer.from_pretrained(model).apply_chat_template
    found = []
    for line in open(source, encoding="utf-8"):
        chat = json.loads(line)["messages"]
        prompt = encode(chat[:-1], add_generation_prompt=True, return_dict=False)
        tokens = encode(chat, return_dict=False)[:-1]  # the line feed after the end of the turn is not learned
        labels = [-100] * len(prompt) + tokens[len(prompt):]
        found.append({"tokens": tokens[:longest], "labels": labels[:longest]})
    return found

def no_tokenizer():
    return type("None", (), {"pad_id": 2})()
'''


def torchtune(job: Job) -> list[str]:
    """It knows no SmolLM2, so the model is spelt out as a Llama 3.2."""
    shape = json.loads((job.model / "config.json").read_text(encoding="utf-8"))
    lora = job.method == "lora"
    model = {
        "_component_": f"torchtune.models.llama3_2.{'lora_' * lora}llama3_2", "vocab_size": shape["vocab_size"],
        "num_layers": shape["num_hidden_layers"], "num_heads": shape["num_attention_heads"], "num_kv_heads": shape["num_key_value_heads"],
        "embed_dim": shape["hidden_size"], "max_seq_len": shape["max_position_embeddings"], "intermediate_dim": shape["intermediate_size"],
        "norm_eps": shape["rms_norm_eps"], "rope_base": int(shape["rope_parameters"]["rope_theta"]), "scale_factor": 1,
    }  # fmt: skip
    if lora:
        model |= {"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True,
                  "lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0}  # fmt: skip
    optimizer = {"_component_": "torch.optim.AdamW", "lr": RATE, "weight_decay": 0.0, "fused": True}
    config = {
        "model": model, "tokenizer": {"_component_": "torchtune_rows.no_tokenizer"}, "output_dir": str(job.folder / "out"),
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(job.model), "model_type": "LLAMA3_2",
            "checkpoint_files": ["model.safetensors"], "recipe_checkpoint": None, "output_dir": str(job.folder / "out"),
        },
        "dataset": {"_component_": "torchtune_rows.rows", "source": str(job.rows), "model": str(job.model), "longest": TOKENS},
        "seed": 0, "shuffle": False, "batch_size": ROWS, "gradient_accumulation_steps": 1, "clip_grad_norm": 1.0, "epochs": 1,
        "max_steps_per_epoch": job.steps, "optimizer": optimizer, "optimizer_in_bwd": False, "resume_from_checkpoint": False,
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}, "compile": False, "device": "cpu", "dtype": "fp32",
        "metric_logger": {"_component_": "torchtune.training.metric_logging.StdoutLogger", "log_dir": str(job.folder / "out")},
        "log_every_n_steps": 1, "log_peak_memory_stats": False, "enable_activation_checkpointing": False,
        "enable_activation_offloading": False, "save_adapter_weights_only": lora,
    }  # fmt: skip
    if lora:
        cosine = "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"
        config["lr_scheduler"] = {"_component_": cosine, "num_warmup_steps": 0, "num_cycles": 0}  # constant
    (job.folder / "torchtune_rows.py").write_text(TORCHTUNE_ROWS, encoding="utf-8")
    recipe = f"{'lora' if lora else 'full'}_finetune_single_device"
    return [str(job.bin / "tune"), "run", recipe, "--config", str(job.write("torchtune.yaml", config))]


def axolotl(job: Job) -> list[str]:
    """Its LoRA kernels are Triton's, so they are off on a CPU."""
    config: dict[str, Any] = {
        "base_model": str(job.model), "datasets": [{"path": str(job.rows), "ds_type": "json", "type": "chat_template", "roles_to_train": ["assistant"]}],
        "dataset_prepared_path": str(job.folder / "prepared"), "output_dir": str(job.folder / "out"), "sequence_len": TOKENS,
        "excess_length_strategy": "truncate", "micro_batch_size": ROWS, "gradient_accumulation_steps": 1, "max_steps": job.steps,
        "num_epochs": 1, "learning_rate": RATE, "lr_scheduler": "constant", "optimizer": "adamw_torch_fused", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "bf16": False, "fp16": False, "tf32": False, "gradient_checkpointing": False, "logging_steps": 1,
        "save_strategy": "no", "val_set_size": 0, "shuffle_merged_datasets": False, "shuffle_before_merging_datasets": False,
        "sample_packing": False, "seed": 0, "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False,
    }  # fmt: skip
    if job.method == "lora":
        config |= {
            "adapter": "lora",
            "lora_r": RANK,
            "lora_alpha": ALPHA,
            "lora_dropout": 0.0,
            "lora_target_linear": True,
        }
    if job.method == "lisa":
        config |= {"lisa_n_layers": LAYERS, "lisa_step_interval": INTERVAL, "lisa_layers_attribute": "model.layers"}
    return [str(job.bin / "axolotl"), "train", str(job.write("axolotl.yaml", config))]


TOOLS: dict[str, Tool] = {
    "lisatune": Tool(("slices", "lisa", "lora", "full"), lisatune, None, loss=r'"loss": ', log="run/metrics.jsonl"),
    "ms-swift": Tool(("lisa", "lora", "full"), ms_swift, ("ms-swift==4.6.0", TORCH, "transformers==5.19.0", "peft==0.20.0"),
                     note="its first loss is TRL's, so it learns the line feed after an answer too"),
    "soup-cli": Tool(("lisa", "lora", "full"), soup, ("soup-cli[train]==0.77.0", TORCH, "transformers==5.24.0", "peft==0.21.2"),
                     note="it shuffles, so its batches are others of the same rows"),
    "TRL": Tool(("lora", "full"), trl, ("trl[peft]==1.16.0", TORCH, "transformers==5.24.0", "peft==0.21.2"),
                note="it learns the line feed after an answer too, and logs entropy and accuracy over the whole vocabulary"),
    "LLaMA-Factory": Tool(("lora", "full"), llamafactory, (
        "llamafactory==0.9.5", TORCH, "transformers==5.6.0", "peft==0.18.1", "accelerate<=1.11.0", "av<=16.0.0", "datasets<=4.0.0",
        "einops", "fastapi", "fire", "gradio<=5.50.0", "hf-transfer", "matplotlib", "modelscope", "numpy", "omegaconf", "packaging",
        "pandas", "protobuf", "pydantic", "pyyaml", "safetensors", "scipy", "sentencepiece", "sse-starlette", "tiktoken",
        "torchdata<=0.11.0", "trl<=0.24.0", "tyro<0.9.0", "uvicorn",
    ), alone=True, note="installed without torchvision and torchaudio, whose wheels need CUDA; it cuts prompts of long rows too"),
    "torchtune": Tool(("lora", "full"), torchtune, ("torchtune==0.6.1", TORCH, "torchao==0.10.0", "transformers==5.24.0"), loss=r"Step \d+ \| loss:",
                      note="it knows no SmolLM2, so its rows are encoded by transformers"),
    "axolotl": Tool(("lisa", "lora", "full"), axolotl, ("axolotl==0.19.0", TORCH),
                    note="its newest release needs Python 3.12; it shuffles, so its batches are others of the same rows"),
}  # fmt: skip
