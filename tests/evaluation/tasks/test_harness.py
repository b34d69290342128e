"""Tasks by their names, and what is said where they cannot be had."""

import importlib.util
import logging

import pytest

pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")

from lisatune import UserError
from lisatune.evaluation.tasks.harness import find_tasks, load_tasks, task_names
from small_tasks import write_tasks


@pytest.fixture
def folder(tmp_path):
    return write_tasks(tmp_path)


def test_a_task_that_does_not_exist_names_the_nearest():
    for wrong, right in (("gsm8", "gsm8k"), ("winogrand", "winogrande"), ("mmlu_anatom", "mmlu_anatomy")):
        with pytest.raises(UserError, match=f"task '{wrong}'.*has no such task; did you mean '{right}'?"):
            find_tasks([wrong])


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"scoring tasks needs the package lm-eval: pip install 'lisatune\[eval\]'"):
        find_tasks(["gsm8k"])


def test_no_task_at_all():
    with pytest.raises(UserError, match="no task is named"):
        task_names(" , ")


def test_data_out_of_reach_say_what_would_help(folder):
    with pytest.raises(UserError, match=r"task 'gsm8k': its data cannot be had \(.*\); give --data-dir"):
        load_tasks(["gsm8k"])
    for part in ("logiqa-en", "lsat-ar", "lsat-lr", "lsat-rc", "sat-math"):
        (folder / f"agieval/{part}.jsonl").write_bytes((folder / "agieval/sat-en.jsonl").read_bytes())
    with pytest.raises(UserError, match="task 'agieval_en'.*name those of its parts whose files are there"):
        load_tasks(["agieval_en"], folder)
    with pytest.raises(UserError, match="holds none of the folders agieval, gsm8k"):
        find_tasks(["gsm8k"], folder / "gsm8k")


def test_a_task_that_runs_what_a_model_writes_is_refused(folder, monkeypatch):
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask, "UNSAFE_CODE", True, raising=False)
    with pytest.raises(UserError, match="task 'winogrande' runs code that the model writes, so it is refused"):
        load_tasks(["winogrande"], folder)


def test_the_harness_index_is_as_it_was(folder):
    load_tasks(["winogrande"], folder)
    with pytest.raises(UserError, match="give --data-dir"):
        load_tasks(["winogrande"])
    assert logging.getLogger("lm_eval").level != logging.ERROR


def test_variants_of_a_task_read_the_same_files(folder):
    """Any task of the harness on a data set that has a local form is local: here GSM8K with worked examples."""
    group = load_tasks(["gsm8k_cot_zeroshot", "gsm8k"], folder)
    assert [len(task.test_docs()) for task in group.get_all_tasks()] == [3, 3]


def test_prompts_and_metrics_are_the_harness_own(folder):
    import lm_eval.tasks
    from lm_eval.tasks.manager import load_yaml

    root = next(iter(lm_eval.tasks.__path__))
    ours = load_tasks(["gsm8k"], folder).get_all_tasks()[0].dump_config()
    theirs = load_yaml(f"{root}/gsm8k/gsm8k.yaml")
    for name in ("doc_to_text", "doc_to_target", "metric_list", "filter_list", "generation_kwargs", "num_fewshot"):
        assert ours[name] == theirs[name]
