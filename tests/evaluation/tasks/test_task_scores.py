"""Scores against slow and clear equals, and a model that is left as it was."""

import random

import numpy
import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")

from lisatune import UserError
from lisatune.evaluation.tasks.score import numbers
from lisatune.evaluation.tasks.scorer import Scorer
from lisatune.models.load import load_model
from small_tasks import SENTENCES, SUBJECTS, write_tasks
from tiny import make_llama, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def model(tokenizer):
    return make_llama(vocab_size=len(tokenizer), max_position_embeddings=2048)


@torch.no_grad()
def log_likelihood(model, tokenizer, context, answer):
    """Sum of the log probabilities of the answer's tokens, one sequence at a time."""
    before = tokenizer(context)["input_ids"]
    whole = tokenizer(context + answer)["input_ids"]
    chances = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(chances[i - 1, whole[i]].item() for i in range(len(before), len(whole)))


def test_winogrande_is_what_one_gets_by_hand(model, tokenizer, folder):
    right = []
    for sentence, first, second, answer in SENTENCES:
        begin, end = sentence.split("_")
        likely = [log_likelihood(model, tokenizer, begin + option, f" {end.strip()}") for option in (first, second)]
        right.append(float(likely.index(max(likely)) == int(answer) - 1))
    score = Scorer(["winogrande"], data_dir=folder)(model, tokenizer, batch_size=3)["winogrande"]
    assert score.values == tuple(right)
    assert 0 < sum(right) < 8
    assert score.value == sum(right) / 8
    assert score.stderr == pytest.approx((score.value * (1 - score.value) / 7) ** 0.5)
    assert (score.metric, score.num_documents, score.num_fewshot) == ("acc", 8, 0)


def test_mmlu_keeps_subjects_and_weighs_them_by_their_questions(model, tokenizer, folder, monkeypatch):
    names = [f"mmlu_{subject}" for subject in SUBJECTS]
    found = Scorer(names, data_dir=folder)(model, tokenizer, batch_size=2)
    for subject, count in SUBJECTS.items():
        right = 0
        for i in range(count):
            about = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
            prompt = f"{about}Which is {i} of {subject}?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
            likely = [log_likelihood(model, tokenizer, prompt, f" {letter}") for letter in "ABCD"]
            right += likely.index(max(likely)) == i % 4
        assert found[f"mmlu_{subject}"].value == pytest.approx(right / count)
        assert found[f"mmlu_{subject}"].num_documents == count


def test_the_mean_of_a_group_is_over_all_its_documents(shared):
    model, tokenizer = load_model(str(shared / "models/stories260K/hf"))
    alone = Scorer(["mmlu_stem"], data_dir=shared / "data", limit=1)(model, tokenizer, batch_size=4)["mmlu_stem"]
    assert alone.stderr == pytest.approx((alone.value * (1 - alone.value) / 18) ** 0.5)
    scorer = Scorer(["mmlu_stem"], data_dir=shared / "data", limit=2)
    score = scorer(model, tokenizer, batch_size=4)["mmlu_stem"]
    assert len(score.parts) == 19
    assert score.num_documents == len(score.values) == 38
    assert score.value == pytest.approx(sum(part.value * part.num_documents for part in score.parts.values()) / 38)


ANSWERS = ["so #### 42", "It is 42 + 1 = 43.\n#### 43.", "The answer is 44"]  # to 2, 3 and 4 plus 40


def test_gsm8k_takes_the_number_after_the_marks(tokenizer, folder, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    asked = []

    def generate(self, requests, disable_tqdm=False):
        asked.extend(request.args[0] for request in requests)
        return ANSWERS

    monkeypatch.setattr(HFLM, "generate_until", generate)
    model = make_llama(vocab_size=len(tokenizer), max_position_embeddings=300)
    scorer = Scorer(["gsm8k"], data_dir=folder)
    score = scorer(model, tokenizer)["gsm8k"]
    assert scorer.num_cut == 3  # 256 of the 300 tokens are for the answer
    assert score.metric == "exact_match, strict-match"
    assert score.values == (1.0, 1.0, 0.0)
    assert score.others == {"exact_match, flexible-extract": 1.0}
    assert score.num_fewshot == 5
    assert asked[0].count("Question:") == 6
    assert asked[0].endswith("Question: What is 2 plus 40?\nAnswer:")
    scorer(model, tokenizer)
    assert asked[:3] == asked[3:]  # the same examples each time


def test_the_five_on_real_files_and_a_real_model(shared):
    model, tokenizer = load_model(str(shared / "models/stories260K/hf"))
    tasks = ["gsm8k", "pubmedqa", "mmlu_anatomy", "agieval_sat_math", "winogrande"]
    scorer, told = Scorer(tasks, data_dir=shared / "data", limit=2), []
    found = scorer(model, tokenizer, batch_size=2, progress=lambda done, total: told.append((done, total)))
    assert list(found) == tasks
    assert [score.num_documents for score in found.values()] == [2] * 5
    assert [score.metric for score in found.values()] == ["exact_match, strict-match", *["acc"] * 4]
    assert told[-1] == (2 * (1 + 3 + 4 + 4 + 2), 2 * (1 + 3 + 4 + 4 + 2))
    assert scorer.num_cut > 0  # abstracts exceed 512 tokens
    assert set(numbers(found)) == set(tasks)


def test_neither_model_nor_random_states_are_changed(model, tokenizer, folder):
    model.train()
    model.model.layers[1].requires_grad_(False)
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    side = tokenizer.padding_side

    def draws():
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    def seeded():
        random.seed(1)
        numpy.random.seed(1)
        torch.manual_seed(1)

    seeded()
    expected = draws()
    seeded()
    first = Scorer(["gsm8k", "winogrande"], data_dir=folder, limit=1)(model, tokenizer)
    assert draws() == expected
    assert model.training
    assert asked == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert tokenizer.padding_side == side
    assert first == Scorer(["gsm8k", "winogrande"], data_dir=folder, limit=1)(model, tokenizer)


def test_examples_before_a_question(model, tokenizer, folder):
    score = Scorer(["winogrande"], data_dir=folder, limit=1, num_fewshot=2)(model, tokenizer)["winogrande"]
    assert score.num_fewshot == 2


def test_what_cannot_be_scored_is_refused(folder):
    tokenizer = make_tokenizer()
    short = make_llama(vocab_size=len(tokenizer), max_position_embeddings=128)
    with pytest.raises(UserError, match="task 'gsm8k' takes answers of up to 256 tokens"):
        Scorer(["gsm8k"], data_dir=folder)(short, tokenizer)
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        Scorer(["winogrande"], data_dir=folder, chat_template=True)(short, tokenizer)
