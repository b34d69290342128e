"""The page of ``lisatune studio`` as people use it, in a real browser."""

import pytest

from browser import BROWSER, browser, look
from serving import EVIL

if BROWSER is None:
    pytest.skip("no Chromium on this machine", allow_module_level=True)

READY = "document.body?.dataset.ready"
TABS = ["rows", "memory", "run", "chat", "export"]


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture
def page(tab, server):
    """The page, with a form that nobody has filled in."""
    tab.screen(1280)
    tab.open(f"{server.url[: server.url.index('?')]}studio.css?token={server.token}")
    tab.js("localStorage.clear()")
    tab.errors.clear()
    tab.open(server.url, READY)
    return tab


def fill(page, **settings):
    for name, value in settings.items():
        page.type(f"#set-{name}", value)


def text(page, selector="body"):
    return page.js(f"document.querySelector({selector!r}).innerText")


def wait_for_text(page, selector, word):
    page.wait(f"document.querySelector({selector!r})?.innerText.includes({word!r})")


def test_the_form_becomes_a_file_and_a_command(page):
    wait_for_text(page, "#deed", "model is missing")
    assert page.js("document.querySelector('#begin')") is None
    fill(page, model="models/tiny", data="rows.jsonl", learning_rate="2e-3")
    page.js("(e => { e.value = 'lora'; e.dispatchEvent(new Event('input')) })(document.querySelector('#set-method'))")
    wait_for_text(page, "#deed", "method: lora")
    assert "learning_rate: 0.002" in text(page, "#deed")
    assert "lisatune train --config runs/first.yaml" in text(page, "#deed")
    page.open(page.js("location.href"), READY)  # the form is kept
    wait_for_text(page, "#deed", "method: lora")
    fill(page, data="../rows.jsonl")
    wait_for_text(page, "#deed", "outside of the folders")


def test_settings_are_searched(page):
    page.type("input[type=search]", "checkpointing")
    shown = page.js("[...document.querySelectorAll('#others .field:not([hidden]) label')].map(e => e.innerText)")
    assert "gradient_checkpointing" in shown
    assert "lora_r" not in shown


def test_the_bars_move_with_the_settings(page):
    fill(page, model="models/tiny", data="rows.jsonl", max_length="32")
    wait_for_text(page, "#deed", "max_length: 32")
    page.click("#tab-memory")
    wait_for_text(page, "#planned", "parameters at a time")
    widths = "[...document.querySelectorAll('#bars .bar')].map(bar => [...bar.querySelectorAll('rect')].reduce((sum, e) => sum + parseFloat(e.getAttribute('width')), 0))"
    assert page.js(widths) == [pytest.approx(98, abs=0.1)]
    page.click("#tab-rows")
    fill(page, max_length="64")
    wait_for_text(page, "#deed", "max_length: 64")
    page.click("#tab-memory")
    wait_for_text(page, "#bars", "before")
    now, before = page.js(widths)
    assert before < 0.7 * now


def test_both_models_answer_side_by_side(page):
    page.click("#tab-chat")
    wait_for_text(page, "#chat-command", "lisatune chat runs/done")
    page.type("#question", "What is 1 plus 1?")
    page.click("#ask")
    page.wait("document.querySelectorAll('.answer p:not(.doing)').length == 2")
    assert page.js("document.querySelectorAll('.wrong').length") == 1  # of the form alone
    assert text(page, "#said-base .answer") != text(page, "#said-trained .answer")
    page.click("#forget")
    assert text(page, "#said-base") == ""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_each_tab_can_be_read(page, home, width, dark):
    evil = EVIL.replace("/", "|").replace("\0", "").replace("\ud800", "")
    (home / "runs" / "done").rename(home / "runs" / evil)
    (home / f"{evil}.jsonl").write_text("")
    page.open(page.js("location.href"), READY)
    page.js("document.querySelectorAll('details').forEach(one => one.open = true)")
    for name in TABS:
        page.screen(width, dark)
        page.click(f"#tab-{name}")
        page.wait(f"!document.querySelector('#{name}').hidden && !document.querySelector('#{name} .doing')")
        if name == "run":
            wait_for_text(page, "#page", "finished")
            wait_for_text(page, "#runs", evil[:30])
        seen = look(page, width, dark)
        assert seen["page"] <= width, name
        assert seen["faint"] == [], name
        assert seen["outside"] == []
    assert page.js("document.querySelectorAll('#rows img, script:not([src]), iframe, #runs img').length") == 0
    assert [one for one in page.errors if "422" not in one] == []


@pytest.mark.slow
def test_from_the_first_click_to_the_chat(page, home):
    fill(
        page,
        model="models/tiny",
        data="rows.jsonl",
        max_steps="30",
        max_length="64",
        learning_rate="1e-2",
        samples="What is 3 plus 3?",
    )
    page.click("#show-rows")
    wait_for_text(page, "#found-rows", "It is 0.</s>")
    assert "It is 0.</s>" in page.js("[...document.querySelectorAll('#found-rows mark')].map(e => e.innerText)")
    page.click("#begin")
    wait_for_text(page, "#page", "30 of 30")
    page.wait("[...document.querySelectorAll('#runs .run')].some(e => e.innerText.includes('first finished'))")
    wait_for_text(page, "#page", "What is 3 plus 3?")
    assert (home / "runs" / "first" / "model" / "model.safetensors").is_file()
    page.click("#tab-chat")
    page.wait("document.querySelector('#chat-run').options.length == 2")
    page.js("(e => { e.value = 'first'; e.dispatchEvent(new Event('input')) })(document.querySelector('#chat-run'))")
    page.type("#question", "What is 3 plus 3?")
    page.click("#ask")
    page.wait("document.querySelectorAll('.answer p:not(.doing)').length == 2")
    assert text(page, "#said-base .answer") != text(page, "#said-trained .answer")
    page.click("#tab-export")
    page.click("#do-export")
    wait_for_text(page, "#exported", "lisatune export runs/")
    assert (home / "exports" / "my-model" / "config.json").is_file()
    assert [one for one in page.errors if "422" not in one] == []
