"""The page of ``lisatune watch`` as people see it: in a real browser, while the run goes on."""

import shutil

import pytest

from browser import BROWSER, browser, look
from lisatune.watch.page import routes_of
from lisatune.watch.runs import Runs
from lisatune.watch.server import PageServer
from serving import EVIL, append, lines, served

if BROWSER is None:
    pytest.skip("no Chromium on this machine", allow_module_level=True)

DRAWN = "document.querySelector('#page')?.dataset.drawn"
SAMPLES = [
    {"step": step, "prompt": prompt, "answer": f"answer {step} " + "word " * 30}
    for step in (0, 4, 8)
    for prompt in ("One?", "Two?")
]


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture(autouse=True)
def _no_errors(tab):
    tab.errors.clear()
    yield
    assert tab.errors == []


def server_of(*folders, **options):
    return served(PageServer(routes_of(Runs(folders)), **{"port": 0} | options))


def ask(tab):
    """What the page does by itself every two seconds."""
    tab.js("dispatchEvent(new Event('online'))")


def text(tab):
    return tab.js("document.body.innerText")


def test_it_grows_while_the_run_does(tab, trained, going):
    with server_of(going) as server:
        tab.screen(1280)
        tab.open(server.url, DRAWN)
        assert "3 of 8" in text(tab)
        assert "training" in text(tab)
        before = tab.js("document.querySelectorAll('circle').length")
        append(going, lines(trained)[4:8])
        ask(tab)
        tab.wait("document.body.innerText.includes('7 of 8')")
        assert tab.js("document.title") == "87% going"
        append(going, lines(trained)[8:])
        append(going, SAMPLES, name="samples.jsonl")
        shutil.copy(trained / "summary.json", going)
        ask(tab)
        tab.wait("document.body.innerText.includes('8 of 8') && document.body.innerText.includes('finished')")
        assert tab.js("document.querySelectorAll('circle').length") > before
        for shown in ("answer 0 ", "answer 8 ", "peak memory", "lisatune train --model", "MiB"):
            assert shown in tab.js(
                "document.querySelectorAll('details').forEach(one => one.open = true), document.body.innerText"
            )
        tab.js(
            "(e => { e.value = 1; e.dispatchEvent(new Event('input')) })(document.querySelector('input[type=range]'))"
        )
        assert "answer 4 " in text(tab)


def test_it_waits_for_a_run_that_has_not_begun(tab, trained, tmp_path):
    with server_of(tmp_path / "later") as server:
        tab.open(server.url, DRAWN)
        assert "No run has begun yet." in text(tab)
        shutil.copytree(trained, tmp_path / "later")
        tab.wait("document.body.innerText.includes('8 of 8')")  # the page asks by itself


def test_the_map_shows_which_layers_trained(tab, trained):
    """Each layer's bar is as long as its share of the steps."""
    import json

    rows = [json.loads(line) for line in lines(trained)[1:]]
    counts = [sum(layer in row["active_layers"] for row in rows) for layer in range(4)]
    with server_of(trained) as server:
        tab.open(server.url, DRAWN)
        widths = tab.js(
            "[...document.querySelectorAll('svg[aria-label^=\"decoder layers\"] rect')].slice(1).map(e => +e.getAttribute('width'))"
        )
    assert widths == pytest.approx([44 * count / max(counts) for count in counts])


def test_it_goes_on_after_a_broken_link(tab, trained, going):
    with server_of(going) as server:
        tab.open(server.url, DRAWN)
        port = server.server_address[1]
    ask(tab)
    tab.wait("document.querySelector('#link').textContent.startsWith('No answer')")
    assert "3 of 8" in text(tab)
    append(going, lines(trained)[4:6])
    with server_of(going, port=port):
        ask(tab)
        tab.wait("document.querySelector('#link').textContent == '' && document.body.innerText.includes('5 of 8')")
    tab.errors.clear()  # that nobody answered


def test_a_resumed_run_takes_its_steps_back(tab, trained, going):
    with server_of(going) as server:
        tab.open(server.url, DRAWN)
        (going / "metrics.jsonl").write_text("".join(lines(trained)[:2]) + '{"step": 2, "loss": 9.5}\n')
        ask(tab)
        tab.wait("document.body.innerText.includes('2 of 8')")
        before = text(tab)
        tab.open(server.url, DRAWN)  # as if nothing else had been there
        assert text(tab) == before


def test_a_reader_who_has_selected_something_is_not_disturbed(tab, trained, going):
    answers = (
        "performance.getEntriesByType('resource').filter(one => one.name.includes('news') && one.responseEnd).length"
    )
    with server_of(going) as server:
        tab.open(server.url, DRAWN)
        tab.js("getSelection().selectAllChildren(document.querySelector('.card'))")
        append(going, lines(trained)[4:6])
        told = tab.js(answers)
        ask(tab)
        tab.wait(f"{answers} > {told}")
        ask(tab)
        tab.wait(f"{answers} > {told + 1}")  # the first one has been dealt with
        assert "3 of 8" in text(tab)
        tab.js("getSelection().removeAllRanges()")
        tab.wait("document.body.innerText.includes('5 of 8')")


@pytest.fixture(scope="module")
def several(trained, tmp_path_factory):
    """Five runs with long and hostile names, hostile rows, scores and samples."""
    folder = tmp_path_factory.mktemp("several")
    for name in ("a", "b", EVIL.replace("/", "|").replace("\0", "").replace("\ud800", ""), "long-" * 30, "e"):
        shutil.copytree(trained, folder / name)
        evil = {
            "step": 9,
            "loss": 2.0,
            "scores": {EVIL: 0.5},
            "sampled_parts": [EVIL],
            "eval_x_loss": 2.0,
            "tokens": 9,
            "step_seconds": 0,
        }
        append(folder / name, [evil])
        append(folder / name, [*SAMPLES, {"step": 8, "prompt": EVIL, "answer": EVIL}], name="samples.jsonl")
        (folder / name / "config.yaml").write_text(
            (trained / "config.yaml").read_text() + f"more: '{EVIL[:80]}'\n", errors="replace"
        )
    return folder


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("many", [False, True], ids=["one", "several"])
def test_it_can_be_read(tab, several, many, width, dark):
    with server_of(several if many else several / "a") as server:
        tab.screen(width, dark)
        tab.open(server.url, DRAWN)
        tab.js("document.querySelectorAll('details').forEach(one => one.open = true)")
        seen = look(tab, width, dark)
    assert seen["texts"] > 60
    assert seen["page"] <= width
    assert seen["faint"] == []
    assert seen["outside"] == []
    assert tab.js("document.querySelectorAll('script, img, iframe').length") == 1
    assert EVIL[:30] in text(tab)


def test_runs_can_be_left_out(tab, several):
    with server_of(several) as server:
        tab.screen(1280)
        tab.open(server.url, DRAWN)
        assert tab.js("document.querySelectorAll('table')[0].rows.length") == 6
        tab.click(".chips button")
        tab.wait("document.querySelectorAll('.card').length == 4")
        tab.click(".chips button")
        tab.wait("document.querySelectorAll('.card').length == 0")


def test_the_token_leaves_the_address(tab, trained):
    with server_of(trained, host="0.0.0.0") as server:
        tab.open(f"http://127.0.0.1:{server.server_address[1]}/?token={server.token}", DRAWN)
        assert tab.js("location.search") == ""
        assert "8 of 8" in text(tab)
        tab.open(f"http://127.0.0.1:{server.server_address[1]}/", DRAWN)
        assert "8 of 8" in text(tab)
