"""An image-text model, trained by TRL on images that the test draws."""

import pytest
import torch
import transformers as hf

from lisatune import LisaCallback, find_layers
from tiny import make_tokenizer

pytest.importorskip("trl", reason="the extra 'sft' is not installed")
Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")

TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}"
)
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def make_processor():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.image_token, tokenizer.image_token_id = "<image>", tokenizer.convert_tokens_to_ids("<image>")
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return hf.LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def make_model(processor):
    torch.manual_seed(0)
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    text = hf.LlamaConfig(
        vocab_size=len(processor.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=processor.tokenizer.image_token_id,
            vision_feature_layer=-1,
        )
    )  # fmt: skip


def rows():
    from datasets import Dataset

    question = [{"type": "image"}, {"type": "text", "text": "colour? "}]
    made = [
        {
            "images": [Image.new("RGB", (16, 16), COLOURS[name])],
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": name}]}],
        }
        for name in list(COLOURS) * 8
    ]
    return Dataset.from_list(made)


@pytest.mark.filterwarnings("default")  # TRL warns of its own coming changes
@pytest.mark.parametrize("train_outside", [False, True])
def test_it_learns_to_name_a_colour(train_outside, tmp_path):
    import trl

    processor = make_processor()
    model = make_model(processor)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=30, learning_rate=1e-2, per_device_train_batch_size=4, max_length=None,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=rows(), processing_class=processor,
        callbacks=[LisaCallback(2, 5, train_outside=train_outside)],
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.6 < 3 < losses[0]  # a guess between two colours costs more
    outside = find_layers(model).parts()["outside"]
    assert any("vision_tower" in name for name in outside)
    assert any("projector" in name for name in outside)
    moved = [name for name, p in outside.items() if not torch.equal(before[name], p)]
    assert bool(moved) == train_outside
    model.eval()
    for name, colour in COLOURS.items():
        inputs = processor(images=[Image.new("RGB", (16, 16), colour)], text=["<image>colour? "], return_tensors="pt")
        with torch.no_grad():
            first = model(**inputs).logits[0, -1].argmax()
        assert processor.tokenizer.decode(first) == name[0]
