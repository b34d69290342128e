"""What SECURITY.md promises, a test for each sentence."""

import ast
import inspect
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

import lisatune
from lisatune import UserError
from lisatune.data.formats import Example
from lisatune.data.tokenize import Encoder
from lisatune.models.load import load_model
from lisatune.plan.forecast import model_config
from lisatune.run.checkpoint import Checkpoints, Damaged, read_manifest
from lisatune.settings import TrainConfig, build_config, read_settings
from lisatune.train import train
from tiny import make_tokenizer

SOURCES = sorted(Path(lisatune.__file__).parent.rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "torch.load", "torch.save", "torch.hub.load", "yaml.load", "yaml.load_all", "yaml.full_load",
    "yaml.unsafe_load", "os.system", "os.popen", "numpy.load", "np.load", "tempfile.mktemp", "extractall",
}  # fmt: skip


def nodes(kind):
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, kind):
                yield path, node


@pytest.fixture
def mark(tmp_path):
    """A file that hostile code would make."""
    return tmp_path / "was-here"


# --- code


def test_nothing_unpickles_or_runs_text_as_code():
    assert len(SOURCES) > 40
    for path, node in nodes(ast.Import | ast.ImportFrom):
        names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else {node.module}
        assert not {str(name).partition(".")[0] for name in names} & FORBIDDEN_MODULES, path
    for path, node in nodes(ast.Call):
        called = ast.unparse(node.func)
        assert called not in FORBIDDEN_CALLS, (path, called)
        assert not {"allow_pickle", "pickle_module", "shell"} & {keyword.arg for keyword in node.keywords}, (
            path,
            called,
        )


def test_remote_code_is_off_by_default_and_the_switch_reaches_every_loader():
    assert TrainConfig.model_fields["trust_remote_code"].default is False
    for function in (load_model, model_config):
        assert inspect.signature(function).parameters["trust_remote_code"].default is False
    loaders = 0
    for path, node in nodes(ast.FunctionDef):
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith((".from_pretrained", ".from_config")):
                if ast.unparse(call.func).startswith("GenerationConfig"):
                    continue  # numbers alone: it takes no switch
                loaders += 1
                given = {keyword.arg: keyword.value for keyword in call.keywords}
                if None in given:  # **options
                    assert "'trust_remote_code': trust_remote_code" in ast.unparse(node), path
                else:
                    assert ast.unparse(given["trust_remote_code"]) in {
                        "trust_remote_code",
                        "config.trust_remote_code",
                        "False",
                    }, path
    assert loaders >= 4


def trap(mark):
    """Python that leaves ``mark`` and is otherwise as a model's own code."""
    return (
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig): model_type = 'trap'\n"
        "class Model(LlamaForCausalLM): config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast): pass\n"
    )


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def model(tmp_path, model_folder):
    return shutil.copytree(model_folder, tmp_path / "model")


@pytest.fixture
def trapped(model, mark, monkeypatch):
    """A model's folder with code of its own for everything that can have some."""
    (model / "own.py").write_text(trap(mark))
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit(model / "config.json", auto_map=own, model_type="trap")
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]})
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(model.parent / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield model
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]  # else later tests would look for their models' code in this folder


def test_code_in_a_models_folder_does_not_run(trapped, mark):
    for load in (load_model, model_config):
        with pytest.raises(UserError, match="custom code"):
            load(str(trapped))
    edit(trapped / "config.json", model_type="llama")  # transformers has a class for it: that one is taken
    edit(trapped / "tokenizer_config.json", auto_map={})
    load_model(str(trapped))
    assert not mark.exists()


def test_code_in_a_models_folder_runs_if_it_is_asked_for(trapped, mark):
    """Else the test above would show nothing."""
    model_config(str(trapped), trust_remote_code=True)
    assert mark.exists()


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_pickled_weights_are_refused_unread(model, mark, monkeypatch):
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Trap(mark)}, model / "pytorch_model.bin")
    with pytest.raises(UserError, match="the weights are pickled"):
        load_model(str(model))
    assert not mark.exists()
    torch.save({"lm_head.weight": torch.zeros(1)}, model / "pytorch_model.bin")
    monkeypatch.setattr("lisatune.models.load.check_model_name", lambda name: None)  # the second lock, of its own
    with pytest.raises(UserError, match="no file named model.safetensors"):
        load_model(str(model))


def test_yaml_is_loaded_as_data(tmp_path, mark):
    text = f"seed: !!python/object/apply:os.mkdir ['{mark}']"
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match="not valid YAML"):
        read_settings(str(tmp_path / "run.yaml"), [])
    read_settings(None, [text.replace(": ", "=", 1)])  # a word that is no YAML is a word
    assert not mark.exists()


def test_a_chat_template_cannot_leave_its_sandbox(mark):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ cycler.__init__.__globals__.os.mkdir('%s') }}" % mark  # noqa: UP031 - braces
    with pytest.raises(UserError, match="the chat template refuses this chat"):
        list(Encoder(tokenizer, 50)([Example("here", ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}))]))  # fmt: skip
    assert not mark.exists()


# --- files


@pytest.fixture
def outside(tmp_path):
    path = tmp_path / "outside"
    path.write_text("mine")
    yield path
    assert path.read_text() == "mine"


def test_a_chat_templates_name_cannot_lead_out_of_the_models_folder(model):
    templates = [{"name": "default", "template": "x"}, {"name": "../../outside", "template": "x"}]
    edit(model / "tokenizer_config.json", chat_template=templates)
    with pytest.raises(UserError, match=r"a chat template of the tokenizer is named '\.\./\.\./outside'"):
        load_model(str(model))


OUTSIDE = [
    "../../../outside",
    "../outside.safetensors",
    "{}/outside.safetensors",
    "a/b.safetensors",
    "..",
    "",
    ".hidden.safetensors",
]


@pytest.mark.parametrize("name", [*OUTSIDE, "x\0.safetensors", "./state.json", "manifest.json", "weights-head"])
def test_a_checkpoint_names_no_file_outside_itself(tmp_path, name):
    Checkpoints(tmp_path).save(1, {}, set(), {})
    folder = tmp_path / "checkpoints" / "checkpoint-1"
    for place in (tmp_path / "outside", folder.parent / "outside.safetensors", folder / "weights-head"):
        shutil.copy(folder / "state.json", place)  # all that the manifest says of it is true, but for its place
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name.format(folder.parent)] = manifest["files"]["state.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match="is not the name of a checkpoint's file"):
        read_manifest(folder)


def run(model_folder, data_file, folder, **settings):
    needed = {"model": str(model_folder), "data": str(data_file), "output": str(folder)}
    options = {"max_steps": 4, "interval_steps": 2, "max_length": 64, "per_device_train_batch_size": 4, "save_steps": 2}
    console = Console(file=io.StringIO(), width=500)
    resume = settings.pop("resume", False)
    train(build_config(needed | options | settings), console=console, resume=resume)
    return console.file.getvalue()


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "config.yaml", "checkpoints", "model", ".model.new", "tensorboard", "run.lock"]
)
def test_a_resumed_run_writes_through_no_link(model_folder, data_file, tmp_path, outside, name):
    run(model_folder, data_file, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    link = tmp_path / "run" / name
    if link.exists():
        link.rename(link.with_name("moved"))
    link.symlink_to(outside)
    with pytest.raises(UserError, match="is a symbolic link"):
        run(model_folder, data_file, tmp_path / "run", resume=True)


def test_a_report_writes_through_no_link(tmp_path, outside):
    write_run(tmp_path / "run")
    for name in ("report.html", ".report.html.new"):
        (tmp_path / "run" / name).symlink_to(outside)
    report(tmp_path / "run")
    assert not (tmp_path / "run" / "report.html").is_symlink()


# --- the report

EVIL = "</title></text></svg><script>alert(1)</script><img src=x onerror=alert(1)>&\"'\ud800"


def write_run(folder, text="layer", **summary):
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"method": text, "model": f"a/{text}", text: [text]}))
    rows = [
        {"step": n, "loss": 1.0, "eval_loss": 1.0, "active_layers": [text[:-1], "y"], "layers": text} for n in (0, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    numbers = {"steps": 2, "tokens": 9, "eval_loss_before": 2.0, "eval_loss_after": 1.0, "train_seconds": 1.0}
    numbers |= {"peak_bytes": 1, "state_bytes": 1, "method": text}
    (folder / "summary.json").write_text(json.dumps(numbers | summary))
    (folder / "answers.json").write_text(
        json.dumps([{"question": text, "expected": text, "before": text, "after": text}])
    )


def report(folder):
    pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
    from lisatune.run.report import write_report

    return write_report(folder).read_text()


def test_a_report_escapes_all_that_a_run_holds(tmp_path):
    write_run(tmp_path / "run", EVIL)
    page = report(tmp_path / "run")
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("</svg>") == page.count("<svg") == 2
    assert page.count("<title>") == page.count("</title>") == 1
    assert page.count("&lt;script&gt;") >= 8  # title, heading, method, three answers, settings, ticks of a figure
    assert "default-src 'none'" in page[: page.index("<title>")]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json", "answers.json"])
@pytest.mark.parametrize(
    "content", ["", "[]", "5", "null", '{"a": 1}', '["a"]', "{", "a: !!python/name:os.system", "\0", "[" * 9999]
)
def test_a_report_of_a_broken_run_is_refused_in_words(tmp_path, name, content):
    write_run(tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    try:
        report(tmp_path / "run")
    except UserError as error:
        assert "holds no finished run to report on" in str(error)  # noqa: PT017


# --- secrets

SECRETS = {
    "HF_TOKEN": "hf_SecretSecretSecret",
    "WANDB_API_KEY": "wandbSecretSecret",
    "OPENAI_API_KEY": "sk-SecretSecret",
}


def test_secrets_of_the_environment_are_in_no_file_and_no_line(model_folder, data_file, tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    said = run(model_folder, data_file, tmp_path / "run", report_to="tensorboard", eval_rows=4)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "report.html", "state.json", "manifest.json"} <= {
        path.name for path in files
    }
    for value in SECRETS.values():
        assert value not in said
        for path in files:
            assert value.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("name", ["model", "data", "eval_data", "output"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_password_in_an_address_is_neither_written_nor_said(
    model_folder, data_file, tmp_path, monkeypatch, name, streaming
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        run(model_folder, data_file, tmp_path / "run", **{name: "https://me:hunter2@host/x", "streaming": streaming})
    assert "hunter2" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.rglob("*hunter2*"))


def test_messages_show_no_password_and_move_no_cursor():
    text = str(UserError("https://me:hunter2@ho@st/x\n\x1b[31m \ud800 \u202e " + "x" * 5000 + " remedy"))
    assert text.startswith("https://***@st/x \\x1b[31m \\ud800 \\u202e xxx")
    assert text.isprintable()
    assert text.endswith("x remedy")
    assert len(text) < 1100
