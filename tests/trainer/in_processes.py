"""Train with ``LisaCallback`` case after case in the processes that torchrun has started: in_processes.py CASES.json"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from lisatune import LisaCallback, UserError
from tiny import make_llama, make_tokenizer

STEP = {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "adam_epsilon": 1e-3, "weight_decay": 0.1}
UNEVEN = {"accelerator_config": {"even_batches": False}}
QUIET = {
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "logging_steps": 100,
    "save_strategy": "no",
    "bf16": False,
}


class StopAfter(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.steps


def rows():
    """23 rows, so that the last batch has one; each with another number of labels."""
    ids = torch.randint(3, 128, (23, 8), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": [-100] * (i % 5) + row[i % 5 :]} for i, row in enumerate(ids)]


def pairs():
    from datasets import Dataset

    words = ["big", "small", "red", "blue", "old", "new", "fat", "thin"] * 2
    return Dataset.from_list([{"prompt": f"a {w}", "chosen": f" cat {w}", "rejected": f" dog {w} no"} for w in words])


def make_trainer(case, callbacks):
    """The Trainer of a case: plain, SFT or DPO."""
    settings = STEP | QUIET | {"output_dir": case["output"]} | case.get("arguments", {})
    if case.get("trainer", "plain") == "plain":
        settings |= {"train_sampling_strategy": "sequential"} | UNEVEN
        arguments = TrainingArguments(**settings)
        if case.get("sharded"):
            on_a_cpu_as_on_gpus(arguments)
        return Trainer(
            model=make_llama(**case.get("model", {})), args=arguments, train_dataset=rows(), callbacks=callbacks
        )
    import trl

    data = pairs()
    if case["trainer"] == "sft":
        data = data.select(range(15))  # so that the last batch has one; DPO's trainer gathers equal batches alone
        data = data.map(lambda row: {"completion": row["chosen"]}, remove_columns=["chosen", "rejected"])
    kinds = {"sft": (trl.SFTConfig, trl.SFTTrainer), "dpo": (trl.DPOConfig, trl.DPOTrainer)}
    config, trainer = kinds[case["trainer"]]
    settings |= {"max_length": 32, "train_sampling_strategy": "sequential"} | (
        UNEVEN if case["trainer"] == "sft" else {}
    )
    model = make_llama(vocab_size=len(make_tokenizer()), **case.get("model", {}))
    reference = [make_llama(vocab_size=len(make_tokenizer()))] if trainer is trl.DPOTrainer else []
    more = {"ref_model": reference[0]} if reference else {}
    arguments = config(**settings)
    if case.get("sharded"):
        on_a_cpu_as_on_gpus(arguments)
    return trainer(
        model=model, args=arguments, train_dataset=data, processing_class=make_tokenizer(), callbacks=callbacks,
        **more,
    )  # fmt: skip


def on_a_cpu_as_on_gpus(arguments):
    """accelerate puts FSDP on GPUs alone; what it does then works on a CPU as well."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    assert arguments.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


class Tell(TrainerCallback):
    """Bytes that this process hands to all-reduce in each step, and holds as optimizer state after it."""

    def __init__(self, output):
        self.path, self.told, self.sent_bytes = Path(output) / "told.json", [], 0
        self.all_reduce = dist.all_reduce

    def counted(self, tensor, *args, **kwargs):
        self.sent_bytes += tensor.nbytes
        return self.all_reduce(tensor, *args, **kwargs)

    def on_train_begin(self, args, state, control, **kwargs):
        dist.all_reduce = self.counted

    def on_step_begin(self, args, state, control, **kwargs):
        self.sent_bytes = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.told.append([self.sent_bytes])

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        values = [v for own in optimizer.state.values() for v in own.values() if isinstance(v, torch.Tensor) and v.ndim]
        self.told[-1].append(sum((v.to_local() if isinstance(v, DTensor) else v).nbytes for v in values))

    def on_train_end(self, args, state, control, **kwargs):
        dist.all_reduce = self.all_reduce
        if state.is_world_process_zero:
            self.path.parent.mkdir(exist_ok=True, parents=True)
            self.path.write_text(json.dumps(self.told))


def run(case):
    """Train, and leave the weights and what was sent in the case's folder; of a mistake, its sentence."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    lisa = LisaCallback(**case.get("lisa", {}))
    callbacks = [lisa, *([Tell(case["output"])] if dist.is_initialized() else [])]
    callbacks += [StopAfter(case["stop"])] if case.get("stop") else []
    try:
        trainer = make_trainer(case, callbacks[1:] if case.get("late") else callbacks)
        if case.get("late"):
            trainer.add_callback(lisa)
        if case.get("evaluate"):
            trainer.evaluate(rows()[:16])  # a batch for each of two processes
        trainer.train(resume_from_checkpoint=case.get("resume"))
    except UserError as error:
        Path(case["output"]).mkdir(exist_ok=True, parents=True)
        (Path(case["output"]) / "refused.txt").write_text(str(error))
        return
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        weights = {name: value.detach().clone().contiguous() for name, value in state.items()}
        save_file(weights, str(Path(case["output"]) / "weights.safetensors"))


def main(path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in json.loads(Path(path).read_text()):
        run(case)


if __name__ == "__main__":
    main(sys.argv[1])
