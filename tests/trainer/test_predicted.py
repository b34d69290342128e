"""The peak that ``LisaCallback`` predicts, against what PyTorch's allocator gives out in the Trainer."""

import gc
import re

import pytest
import transformers as hf

from lisatune import LisaCallback
from lisatune.memory.measure import allocated_peak, tensor_bytes
from lisatune.trainer.forecast import longest_row
from peaks import WIDE
from tiny import make_llama, make_tokenizer

pytest.importorskip("trl", reason="the extra 'sft' is not installed")
ROWS = [{"input_ids": list(range(3, 123)), "labels": list(range(3, 123))} for _ in range(12)]
LAYERS = {"num_active": 1, "interval_steps": 5, "sampler": "fixed", "sampler_options": {"layers": [2]}}
pytestmark = pytest.mark.filterwarnings("default")  # TRL warns of its own coming changes


class Kept(LisaCallback):
    """Keeps what it tells."""

    def tell(self, lines):
        self.told = [*getattr(self, "told", []), *lines]


def make_gpt_oss():
    config = hf.GptOssConfig(
        vocab_size=4000, hidden_size=128, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, head_dim=32,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 3,
    )  # fmt: skip
    return hf.GptOssForCausalLM(config)


def make_gemma2():
    config = hf.Gemma2Config(
        vocab_size=4000, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, head_dim=32,
        num_key_value_heads=2,
    )  # fmt: skip
    return hf.Gemma2ForCausalLM(config)


def arguments(folder, kind=hf.TrainingArguments, **more):
    usual = {
        "max_steps": 2, "per_device_train_batch_size": 3, "use_cpu": True, "report_to": [], "bf16": False, "disable_tqdm": True,
        "gradient_checkpointing": False, "save_strategy": "no", "learning_rate": 1e-3,
    }  # fmt: skip
    return kind(output_dir=str(folder), **(usual | more))


def dpo(folder, lisa, **more):
    import trl
    from datasets import Dataset

    pairs = Dataset.from_list([{"prompt": "x" * 30, "chosen": "y" * 60, "rejected": "z" * 60} for _ in range(8)])
    return trl.DPOTrainer(
        model=make_llama(**WIDE), ref_model=make_llama(**WIDE), args=arguments(folder, trl.DPOConfig, max_length=256, **more),
        train_dataset=pairs, processing_class=make_tokenizer(), callbacks=[lisa],
    )  # fmt: skip


def plain(folder, lisa, model=None, **more):
    return hf.Trainer(
        model=model or make_llama(**WIDE), args=arguments(folder, **more), train_dataset=ROWS, callbacks=[lisa]
    )


@pytest.mark.parametrize(
    ("make", "lisa"),
    [
        (lambda folder, lisa: plain(folder, lisa, gradient_accumulation_steps=2), LAYERS),
        (lambda folder, lisa: plain(folder, lisa, gradient_checkpointing=True), LAYERS),
        (lambda folder, lisa: plain(folder, lisa), {"sampled_unit": "slices"}),
        (lambda folder, lisa: plain(folder, lisa, make_gpt_oss()), LAYERS),
        (lambda folder, lisa: plain(folder, lisa, make_gemma2()), LAYERS),
        (dpo, LAYERS),
        (lambda folder, lisa: plain(folder, lisa, bf16=True), LAYERS),
        (lambda folder, lisa: plain(folder, lisa, bf16=True, gradient_checkpointing=True), LAYERS),
        (lambda folder, lisa: dpo(folder, lisa, bf16=True), LAYERS),
    ],
    ids=[
        "accumulation",
        "checkpointing",
        "slices",
        "gpt_oss",
        "Gemma 2",
        "DPO",
        "bf16",
        "bf16, checkpointing",
        "DPO in bf16",
    ],
)
def test_the_peak_is_what_the_allocator_gives_out(make, lisa, tmp_path):
    """Within 1%: 0.07% were seen."""
    callback = Kept(**lisa)
    trainer = make(tmp_path, callback)
    reference = getattr(trainer, "ref_model", None)
    models = [trainer.model, *([reference] if reference is not None else [])]
    held = sum(tensor_bytes([*model.parameters(), *model.buffers()]) for model in models)
    gc.collect()  # what is freed while the profiler looks would be taken off
    peak = held + allocated_peak(trainer.train)
    assert callback._record.predicted_bytes == pytest.approx(peak, rel=0.01)
    assert "predicted peak" in callback.told[2]
    assert "(predicted " in callback.told[-1]
    assert ("reference model" in callback.told[2]) == (reference is not None)


@pytest.mark.parametrize(
    ("more", "lisa", "reason"),
    [
        ({"optim": "sgd"}, LAYERS, "only steps of AdamW are known.*SGD"),
        ({"bf16": True}, {"sampled_unit": "slices"}, "of mixed precision only bf16 with layers is known"),
    ],
)
def test_what_is_not_predicted_is_said(more, lisa, reason, tmp_path):
    callback = Kept(**lisa)
    plain(tmp_path, callback, **more, max_steps=1).train()  # which goes on without it
    assert re.search(f"come on top, not predicted: {reason}", callback.told[2])


def test_the_longest_row_by_the_names_of_the_columns():
    assert longest_row(ROWS, None) == 120
    assert longest_row(ROWS, 50) == 50
    assert (
        longest_row(
            [{"prompt_ids": [1], "completion_ids": [2, 3]}, {"prompt_ids": [1, 1], "completion_ids": [2] * 5}], None
        )
        == 7
    )
    assert (
        longest_row([{"prompt_input_ids": [1] * 9, "chosen_input_ids": [1] * 4, "rejected_input_ids": [1] * 6}], None)
        == 6
    )
